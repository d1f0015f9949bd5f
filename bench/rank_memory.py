"""What each rank of a model has taken of a CPU's memory, beside what it was planned with.

Counted is memory that a process has to itself: the anonymous part of what is resident, and what it shares with other
ranks (RssAnon and RssShmem of /proc), but no pages of mapped files, such as weights on their way and the code of
libraries. Of each process its own share is taken off that it held when the plan was made: Python, torch, and a model
read but for its weights. The plan starts there as well, since it looks at what is free then.

The most is what a thread has seen, looking every millisecond while the model loads, and while it runs what is planned
for: a step of as many tokens as a kernel takes through whole layers, which keeps its memory, and then the largest step,
of as many tokens and with as many log probabilities of prompts.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tightrope.backends.detect import open_backend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.part import Part
from tightrope.backends.hf.ranks.team import Team
from tightrope.backends.memory import private_memory
from tightrope.backends.planning import DeviceShare, rank_name
from tightrope.backends.protocol import Backend, Chunk, WantLogits
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.sampler.step_logits import StepLogits
from tightrope.kernels import dispatch

LOOK_S = 0.001
SEQUENCES, ANSWER = 2, 8  # At a time, and steps behind their prompts.
CACHE_TOKENS, WINDOW = 4096, 2048
FIRST_ID, IDS = 5, 200  # Prompts are of these tokens, which every model has.


@dataclass(frozen=True, slots=True)
class Taken:
    """One rank: bytes that were planned for weights, cache and workspace, that it took, and that it held before."""

    rank: str
    weights: int
    cache: int
    workspace: int
    taken: int
    before: int

    @property
    def planned(self) -> int:
        return self.weights + self.cache + self.workspace

    @property
    def share(self) -> float:
        """What was taken, of what was planned."""
        return self.taken / self.planned


class Watch:
    """The most that processes have had to themselves while it looks."""

    def __init__(self) -> None:
        self.before: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def begin(self, pids: Sequence[int]) -> None:
        self.before = {pid: private_memory(pid) for pid in pids}
        self.most = dict(self.before)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            for pid in self.most:
                self.most[pid] = max(self.most[pid], private_memory(pid))


def measured(path: Path, ranks: int, threads: int) -> list[Taken]:
    """Each rank's memory, the first one's first. To be asked of a process that has loaded no model before."""
    settings = ModelSettings(
        model=str(path), device="cpu", threads=threads, tensor_parallel=ranks, max_model_len=WINDOW,
        max_num_seqs=SEQUENCES, gguf_engine="own", cache=CacheSettings(tokens=CACHE_TOKENS),
    )  # fmt: skip
    watch = Watch()
    with _watched_from_the_plan_on(watch), closing(open_backend(settings, lambda _: None)) as backend:
        assert isinstance(backend, HFBackend)
        run_largest_steps(backend)
        watch.end()
        memory = backend.card.memory
        alone = DeviceShare(
            rank_name(0, "cpu"), memory.memory_bytes, memory.weight_bytes, memory.cache_bytes, memory.workspace_bytes
        )
        planned = memory.shares or (alone,)
    return [
        Taken(
            share.device, share.weight_bytes, share.cache_bytes, share.workspace_bytes,
            watch.most[pid] - watch.before[pid], watch.before[pid],
        )
        for share, pid in zip(planned, watch.before, strict=True)
    ]  # fmt: skip


@contextmanager
def _watched_from_the_plan_on(watch: Watch) -> Iterator[None]:
    """Meanwhile a model that is about to load has its ranks watched."""

    def watching(of: type[Team] | type[Part]) -> Callable[..., None]:
        load = of.load

        def loading(part: Team | Part, *arguments: object) -> None:
            if not watch.before:  # A team's first rank is a Part, which loads within it.
                others = part.ranks.processes if isinstance(part, Team) else ()
                watch.begin([os.getpid(), *(process.pid for process in others)])
            load(part, *arguments)  # type: ignore[arg-type]

        return loading

    with mock.patch.object(Team, "load", watching(Team)), mock.patch.object(Part, "load", watching(Part)):
        yield


def run_largest_steps(backend: Backend) -> None:
    """One step through whole layers, one as large as may be, and short ones of two sequences side by side."""
    most, scored = backend.capabilities.max_step_tokens, backend.capabilities.max_prompt_rows
    few = [FIRST_ID] * min(most, dispatch.MOST_LAYER_TOKENS)
    backend.kv.open(SEQUENCES, few, "", reuse="nothing")
    assert backend.kv.reserve(SEQUENCES, len(few))
    backend.forward([Chunk(SEQUENCES, few, 0, "last")])
    backend.kv.close(SEQUENCES, keep=False)
    lengths = [length for length in (scored, most - scored) if length]
    prompts = [[FIRST_ID + (number + 7 * i) % IDS for i in range(length)] for number, length in enumerate(lengths)]
    for number, prompt in enumerate(prompts):
        backend.kv.open(number, prompt, "", reuse="nothing")
        assert backend.kv.reserve(number, len(prompt) + ANSWER)
    wants: tuple[WantLogits, ...] = ("all", "last")
    chunks = [Chunk(number, prompt, 0, want) for number, (prompt, want) in enumerate(zip(prompts, wants, strict=False))]
    logits = StepLogits(backend.forward(chunks))
    logits.scores(slice(0, scored), prompts[0], 5)
    del logits
    for step in range(ANSWER):
        backend.forward(
            [Chunk(number, [FIRST_ID], len(prompt) + step, "last") for number, prompt in enumerate(prompts)]
        )
