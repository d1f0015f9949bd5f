"""What the first rank tells the others, and what they answer: msgpack, and plain numbers as they lie in memory."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from tightrope.backends.hf.ranks.gather import Way
from tightrope.backends.hf.run.steps import StepInputs
from tightrope.backends.planning import MemoryShares
from tightrope.kernels.forms.layout import CacheDtype, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows

Pairs = Sequence[tuple[int, int]]


class Open(Struct, frozen=True, tag=True):
    """Read all of the model but its weights. `settings` is a ModelSettings as JSON; `source` is a module's `inspect`.

    Answered by Found. way, store: how ranks meet; see open_gather.
    """

    path: str
    source: str
    settings: str
    rank: int
    count: int
    device: str
    threads: int
    way: Way
    store: str


class Found(Struct, frozen=True, tag=True):
    """What a rank's part takes, in bytes; cache_bytes: those of a token."""

    weight_bytes: int
    cache_bytes: int


class MakePlan(Struct, frozen=True, tag=True):
    """Plan with these settings, on a CPU with `host_bytes` of the machine's memory. Answered by Planned."""

    settings: str
    host_bytes: int | None


class Planned(Struct, frozen=True, tag=True):
    """What a rank has room for, and what that takes."""

    window: int  # In tokens.
    num_pages: int
    step_tokens: int
    memory: MemoryShares


class Load(Struct, frozen=True, tag=True):
    """Load what was planned last. Answered by Loaded."""


class Loaded(Struct, frozen=True, tag=True):
    """The KV heads that a rank keeps of each layer: the first, and how many."""

    kept: list[tuple[int, int]]


class Beside(Struct, frozen=True, tag=True):
    """Make a runner of this number over other caches: dtype, pages, whether windowed, whether keys are divided.

    Of caches whose keys are divided it is by what Calibrate has found.
    """

    runner: int
    caches: list[tuple[CacheDtype, int, bool, bool]]


class Calibrate(Struct, frozen=True, tag=True):
    """Find key factors by what a runner's caches hold. Answered by Ok, whose payload is all of them, float32."""

    runner: int


class Drop(Struct, frozen=True, tag=True):
    """Forget runners."""

    runners: list[int]


class AllocateCache(Struct, frozen=True, tag=True):
    """Make the caches of the plan and a runner over them, number 0. Answered by Ok."""


class WarmUp(Struct, frozen=True, tag=True):
    """Compile what steps launch. Answered by Ok."""


class Record(Struct, frozen=True, tag=True):
    """See ModelRunner.record_decode. Answered by Ok."""

    max_num_seqs: int
    max_model_len: int


class UsedAdapters(Struct, frozen=True):
    """AdapterRows."""

    slots: bytes
    scales: bytes
    present: tuple[int, ...]
    launches: int | None


class Step(Struct, frozen=True, tag=True):
    """StepInputs for a runner; what is windowed are its block tables and slots."""

    runner: int
    token_ids: bytes
    query_starts: bytes
    context_lens: bytes
    block_tables: bytes
    slots: bytes
    positions: bytes
    sequence_of: bytes
    max_query_len: int
    max_context_len: int
    lengths: tuple[tuple[int, int], ...]
    windowed: tuple[bytes, bytes] | None
    rope_lengths: tuple[int, ...]
    rows: bytes
    adapters: UsedAdapters | None


class EndStep(Struct, frozen=True, tag=True):
    """Tell what became of the last steps, of which one was left. Answered by Ended."""


class Ended(Struct, frozen=True, tag=True):
    """`error`: why this rank has left a step; None where it hasn't."""

    error: str | None
    is_out_of_memory: bool


class MeetAgain(Struct, frozen=True, tag=True):
    """Count meetings from here on, as all ranks do. Answered by Ok."""

    num_meetings: int


class CopyPages(Struct, frozen=True, tag=True):
    """See ModelRunner.copy_pages, of runner 0 as all below."""

    copies: Pairs
    are_windowed: bool


class CopySlots(Struct, frozen=True, tag=True):
    """Sources and targets, int64."""

    sources: bytes
    targets: bytes


class ReadPages(Struct, frozen=True, tag=True):
    """Answered by Ok, whose payload they are."""

    numbers: Sequence[int]
    window_numbers: Sequence[int]


class WritePages(Struct, frozen=True, tag=True):
    """See ModelRunner.write_pages; the payload is what is to be written, of this rank's heads."""

    shape: tuple[int, int]
    pages: Pairs
    windows: Pairs


class PrepareAdapter(Struct, frozen=True, tag=True):
    """Read an adapter, beside steps. Answered by Ok."""

    name: str
    path: str


class PutAdapter(Struct, frozen=True, tag=True):
    """Put the adapter that was prepared last by this name in place. Answered by Ok."""

    name: str


class RemoveAdapter(Struct, frozen=True, tag=True):
    name: str


class Ok(Struct, frozen=True, tag=True):
    pass


class Failed(Struct, frozen=True, tag=True):
    """A BackendError; `has_no_room`: a DoesNotFit."""

    error: str
    has_no_room: bool = False


Setup = Open | MakePlan | Load | WarmUp | Calibrate | AllocateCache | Record
Adapter = PrepareAdapter | PutAdapter | RemoveAdapter
Pages = CopyPages | CopySlots | ReadPages | WritePages
Command = Setup | Adapter | Beside | Drop | Step | EndStep | MeetAgain | Pages
Answer = Found | Planned | Loaded | Ended | Ok | Failed


def step_message(runner: int, inputs: StepInputs) -> Step:
    """A step on its way to another rank."""
    layout, windowed, used = inputs.layout, inputs.layout.windowed, inputs.adapters
    return Step(
        runner,
        token_ids=_raw(inputs.token_ids),
        query_starts=_raw(layout.query_starts),
        context_lens=_raw(layout.context_lens),
        block_tables=_raw(layout.block_tables),
        slots=_raw(layout.slots),
        positions=_raw(layout.positions),
        sequence_of=_raw(layout.sequence_of),
        max_query_len=layout.max_query_len,
        max_context_len=layout.max_context_len,
        lengths=layout.lengths,
        windowed=None if windowed is None else (_raw(windowed.block_tables), _raw(windowed.slots)),
        rope_lengths=inputs.rope_lengths,
        rows=_raw(inputs.rows),
        adapters=None
        if used is None
        else UsedAdapters(_raw(used.slots), _raw(used.scales), used.present, used.launches),
    )


def inputs_of(step: Step) -> StepInputs:
    """The step that `step_message` was given."""
    num_sequences = len(step.lengths)

    def tables(raw: bytes) -> Tensor:
        return _tensor(raw, np.int32).view(num_sequences, -1)

    layout = StepLayout(
        query_starts=_tensor(step.query_starts, np.int32),
        context_lens=_tensor(step.context_lens, np.int32),
        block_tables=tables(step.block_tables),
        slots=_tensor(step.slots, np.int64),
        positions=_tensor(step.positions, np.int32),
        sequence_of=_tensor(step.sequence_of, np.int32),
        max_query_len=step.max_query_len,
        max_context_len=step.max_context_len,
        lengths=step.lengths,
    )
    if step.windowed is not None:
        block_tables, slots = step.windowed
        windowed = replace(layout, block_tables=tables(block_tables), slots=_tensor(slots, np.int64))
        layout = replace(layout, windowed=windowed)
    used = step.adapters
    return StepInputs(
        token_ids=_tensor(step.token_ids, np.int64),
        layout=layout,
        rope_lengths=step.rope_lengths,
        rows=_tensor(step.rows, np.int64),
        adapters=None
        if used is None
        else AdapterRows(_tensor(used.slots, np.int32), _tensor(used.scales, np.float32), used.present, used.launches),
    )


def slots_message(sources: Tensor, targets: Tensor) -> CopySlots:
    return CopySlots(_raw(sources), _raw(targets))


def slots_of(message: CopySlots) -> tuple[Tensor, Tensor]:
    return _tensor(message.sources, np.int64), _tensor(message.targets, np.int64)


def _raw(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _tensor(raw: bytes, dtype: DTypeLike) -> Tensor:
    numbers: NDArray[np.generic] = np.frombuffer(raw, dtype)
    return torch.from_numpy(numbers.copy())  # Torch takes no memory that can't be written to.
