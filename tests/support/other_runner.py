"""A runner in a process of its own, which is sent what it is to do and answers with logits."""

import pickle
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run.steps import StepInputs
from tightrope.backends.settings import ModelSettings

Copies = list[tuple[int, int]]


class OtherRunner:
    """Both ends of the pipe speak in pickled values: nothing is shared."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def run(self, work: StepInputs | Copies) -> Tensor:
        self._pipe.send_bytes(pickle.dumps(work))
        return pickle.loads(self._pipe.recv_bytes())


@contextmanager
def other_runner(folder: Path, settings: ModelSettings) -> Iterator[OtherRunner]:
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, folder, settings), daemon=True)
    process.start()
    there.close()
    with here:
        yield OtherRunner(here)
    process.join()


def _serve(pipe: Connection, folder: Path, settings: ModelSettings) -> None:
    with closing(HFBackend(folder, settings, lambda _: None)) as backend:
        while True:
            try:
                work = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            if isinstance(work, StepInputs):
                answer = backend.runner.run(work)
            else:
                backend.runner.copy_pages(work, are_windowed=False)
                answer = torch.empty(0)
            pipe.send_bytes(pickle.dumps(answer))
