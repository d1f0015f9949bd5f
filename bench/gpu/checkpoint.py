"""A tiny checkpoint as the server runs it: steps as they are, recorded ones and those on the CPU give the same logits.

Sequences branch off from one another, so that pages are copied, and grow beyond the window that the model was trained
for, so that the frequencies of dynamic NTK scaling differ between them and the tables of angles move.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu.run import Row, Run, tried
from bench.small_models import write_model
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.part import Part
from tightrope.backends.hf.run import graphs
from tightrope.backends.hf.run.graphs import CudaCapture
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.kernels import dispatch
from tightrope.kernels.triton import ops

STEPS, BATCHES = 30, (1, 2, 3, 5)
TRAINED, WINDOW = 64, 256  # tokens
SHARED = 40  # tokens with which all sequences begin: two pages and a half
NTK = {"max_position_embeddings": TRAINED, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
# Of the largest logit. Recorded batches are filled up, so that sums are made in another order; on the CPU activations
# are float32. `apart` says by how much the same steps differ after other prompts: who reads wrong places is as far off.
RECORDED_BOUND, CPU_BOUND = 1e-2, 6e-2


@dataclass
class Script:
    """The same steps on any backend: what each gave, and how many pages were copied for it."""

    logits: list[Tensor] = field(default_factory=list)  # [B, V] of each decode step
    num_copied: int = 0


class Capture:
    """Records steps and counts them; on a CPU a recording is the step itself."""

    num_made = 0  # by all of them

    def __init__(self) -> None:
        self._capture = CudaCapture() if torch.cuda.is_available() else lambda step: step

    def __call__(self, step: graphs.Replay) -> graphs.Replay:
        replay = self._capture(step)
        Capture.num_made += 1
        return replay


def rows(run: Run) -> Iterator[Row]:
    batches, num_steps = ((3,), 3) if run.is_smoke else (BATCHES, STEPS)
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "tiny", NTK)
        found: dict[tuple[str, int], Script] = {}
        for side, device, is_recorded in (
            ("CPU", "cpu", False),
            ("eager", run.device.type, False),
            ("recorded", run.device.type, True),
        ):
            with opened(folder, device, is_recorded=is_recorded, by_triton=side != "CPU") as model:
                for num_seqs in batches:
                    title: Row = {"case": f"{side}, {num_seqs} sequences"}
                    yield tried(title, partial(_follow, model, num_seqs, num_steps, found, side))
                if side == "CPU":
                    others = {num_seqs: play(model, num_seqs, num_steps, prompt_of=3) for num_seqs in batches}
    for side, other, bound in (("eager", "CPU", CPU_BOUND), ("recorded", "eager", RECORDED_BOUND)):
        for num_seqs in batches:
            if (side, num_seqs) in found and (other, num_seqs) in found:
                pair = found[side, num_seqs], found[other, num_seqs]
                yield {"case": f"{side} = {other}, {num_seqs} sequences", **_alike(*pair, others[num_seqs], bound)}


@contextmanager
def opened(folder: Path, device: str, *, is_recorded: bool, by_triton: bool = True) -> Iterator[HFBackend]:
    """The server's own backend. by_triton: also on a CPU, where an interpreter runs the card's kernels."""
    settings = ModelSettings(
        model=str(folder),
        device=device,
        max_model_len=WINDOW,
        max_num_seqs=max(BATCHES),
        cache=CacheSettings(tokens=8 * WINDOW, dtype="q8"),
    )
    Capture.num_made = 0
    with ExitStack() as stack:
        stack.enter_context(patch.object(Part, "can_be_recorded", is_recorded))
        stack.enter_context(patch.object(graphs, "CudaCapture", Capture))
        if by_triton and device == "cpu":
            stack.enter_context(patch.object(dispatch, "_kernels_for", lambda x: ops))
        model = HFBackend(folder, settings, lambda done: None)
        yield model
        model.close()


def _follow(model: HFBackend, num_seqs: int, num_steps: int, found: dict[tuple[str, int], Script], side: str) -> Row:
    script = found[side, num_seqs] = play(model, num_seqs, num_steps)
    has_copied = num_seqs == 1 or script.num_copied > 0
    has_recorded = (Capture.num_made > 0) is (side == "recorded")
    return {
        "copied_pages": script.num_copied,
        "recordings": Capture.num_made,
        "holds": has_copied and has_recorded,
    }


def play(model: HFBackend, num_seqs: int, num_steps: int, prompt_of: int | None = None) -> Script:
    """Prompts one by one, then steps of all sequences at once. prompt_of: the one token of all prompts, if given."""
    script = Script()
    draw = torch.Generator().manual_seed(num_seqs)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 256, (count,), generator=draw).tolist()

    copy = model.runner.copy_pages

    def counted(copies: Sequence[tuple[int, int]], *, are_windowed: bool) -> None:
        script.num_copied += len(copies)
        copy(copies, are_windowed=are_windowed)

    shared = tokens(SHARED)
    with patch.object(model.runner, "copy_pages", counted):
        ends = []
        for seq_id in range(num_seqs):
            prompt = [*shared, *tokens(5 + 11 * seq_id)]
            if prompt_of is not None:
                prompt = [prompt_of] * len(prompt)
            start = model.kv.open(seq_id, prompt, "").num_tokens
            step(model, [Chunk(seq_id, prompt[start:], start, "last")])
            ends.append(len(prompt))
        for _ in range(num_steps):
            chunks = [Chunk(seq_id, tokens(1), end, "last") for seq_id, end in enumerate(ends)]
            script.logits.append(step(model, chunks).clone())
            ends = [end + 1 for end in ends]
        for seq_id in range(num_seqs):
            model.kv.close(seq_id, keep=False)
    model.kv.check_integrity()
    return script


def step(model: HFBackend, chunks: Sequence[Chunk]) -> Tensor:
    """A step as the engine takes it."""
    for chunk in chunks:
        assert model.kv.reserve(chunk.seq_id, len(chunk.token_ids))
    logits = model.forward(chunks)
    for chunk in chunks:
        model.kv.commit(chunk.seq_id, chunk.start, chunk.token_ids)
    return logits


def _alike(one: Script, other: Script, elsewhere: Script, bound: float) -> Row:
    """The largest difference in any step, as a share of the largest logit."""
    found, wanted, apart = (torch.stack(script.logits) for script in (one, other, elsewhere))
    largest = wanted.abs().max()
    error, distance = (((logits - wanted).abs().max() / largest).item() for logits in (found, apart))
    return {"error": error, "bound": bound, "apart": distance, "holds": error <= bound < distance / 3}
