"""A step for which the card has no memory fails by itself, and the next gives what it gave before."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu.checkpoint import opened, step
from bench.gpu.run import Row, Run, tried
from bench.small_models import write_model
from tightrope.backends.errors import BackendError
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.protocol import Chunk

LARGE, SMALL = 200, 20  # tokens of prompts


def rows(run: Run) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "tiny")
        for is_recorded in (False, True):
            with opened(folder, run.device.type, is_recorded=is_recorded, by_triton=is_recorded) as model:
                how = "recorded" if is_recorded else "eager"
                yield tried({"case": f"no memory for a step, {how}"}, partial(_fail_once, model, run))


def _fail_once(model: HFBackend, run: Run) -> Row:
    wanted = _answer(model, 1)
    model.kv.open(0, range(3, 3 + LARGE), "")
    with _no_memory(model, run):
        refusal = _refusal(model, [Chunk(0, range(3, 3 + LARGE), 0, "all")])
    model.kv.close(0, keep=False)
    found = _answer(model, 2)
    model.kv.check_integrity()
    is_equal = torch.equal(found, wanted)
    return {"refusal": refusal, "same_logits": is_equal, "holds": is_equal and "memory" in (refusal or "")}


def _refusal(model: HFBackend, chunks: Sequence[Chunk]) -> str | None:
    """What the engine is told."""
    try:
        step(model, chunks)
    except BackendError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _answer(model: HFBackend, seq_id: int) -> Tensor:
    """Logits of a prompt and of a step after it, [2, V]."""
    tokens = list(range(3, 3 + SMALL))
    model.kv.open(seq_id, tokens, "", reuse="nothing")
    prompt = step(model, [Chunk(seq_id, tokens, 0, "last")]).clone()
    after = step(model, [Chunk(seq_id, [7], SMALL, "last")]).clone()
    model.kv.close(seq_id, keep=False)
    return torch.cat((prompt, after))


@contextmanager
def _no_memory(model: HFBackend, run: Run) -> Iterator[None]:
    """Leave the process no more of the card than it holds; on a CPU the step fails as if there were none."""
    if run.device.type != "cuda":
        error = torch.OutOfMemoryError("CUDA out of memory.")
        with patch.object(model.runner, "tables", side_effect=error):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(run.device).total_memory
    hoard = []
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        for size in (1 << 20, 1 << 16, 1 << 9):  # what is reserved and not in use is taken, too
            while True:
                try:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device=run.device))
                except torch.OutOfMemoryError:
                    break
        yield
    finally:
        hoard.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
