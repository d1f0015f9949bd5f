"""From what a model wants to what its files hold: plain tensors to copy, and quantized linears to build."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain
from threading import Lock

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.read_ahead import Range
from tightrope.backends.files.tensor_names import FileNames
from tightrope.backends.hf.load.weights import ExpertWeights, LinearWeights, WantedWeights, Weight
from tightrope.backends.hf.modules.matrices import Matrix, Piece, side_by_side
from tightrope.backends.quant.find import Quantization
from tightrope.backends.tensor_parallel import Span, Spans, within
from tightrope.kernels.forms.quantized import TILE, Room, Take
from tightrope.kernels.packing import new_tiles

Row = tuple[str, int, Span]  # A linear's name, its number of outputs, and those of them that are built.
Hold = Callable[[Matrix], Matrix]
SHARES_BYTES = 4096  # At most, for how a matrix is shared out and joined on a card, and for the book of its codes.
# projections that some models fuse, and that EXL2's converter splits
SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Source:
    """One linear of the files, or a rank's part of it: the tensors that it needs, and how it is made of them."""

    tensors: tuple[str, ...]
    reads: tuple[Range, ...]  # Of the files.
    num_outputs: int
    num_bytes: tuple[int, ...]  # Of each tensor that it becomes in a card's memory.
    build: Callable[[], tuple[Piece, Tensor | None]]  # It gives the weight, and the bias [N] float32.


@dataclass(slots=True)
class Assembly:
    """Linears that belong together; `deliver` is called with all of them once the last one is built.

    It puts the matrix through the function that it is given, but for experts: those are laid out anew together.
    """

    sources: tuple[Source, ...]
    deliver: Callable[[Sequence[tuple[Piece, Tensor | None]], Hold], None]
    are_experts: bool = False
    others: frozenset[str] = frozenset()  # Tensors of these linears that other ranks read.
    _built: dict[int, tuple[Piece, Tensor | None]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def build(self, index: int, hold: Hold) -> None:
        """Make one of the sources; another thread may make another one meanwhile."""
        built = self.sources[index].build()
        with self._lock:
            self._built[index] = built
            if len(self._built) < len(self.sources):
                return
        self.deliver([self._built[i] for i in range(len(self.sources))], hold)
        self._built.clear()


def assemble(
    wants: WantedWeights, quantization: Quantization | None, names: FileNames, device: torch.device,
    tied: tuple[str, str] | None = None,
) -> tuple[list[Weight], list[Assembly]]:  # fmt: skip
    """What is to be copied, and what is to be built.

    tied: names of head and embedding, which are one matrix where the files have but the latter, and it is quantized.
    Raises BackendError where the headers of a quantized linear don't fit the model.
    """
    weights = list(wants.weights)
    assemblies: list[Assembly] = []
    assembler = None if quantization is None else _Assembler(quantization, names, device)
    for linear in _with_tables(wants, tied, assembler):
        built = None if assembler is None else assembler.linear(linear)
        if built is None:
            weights += linear.plain()
        else:
            assemblies.append(built)
    for experts in wants.experts:
        built = None if assembler is None else assembler.experts(experts)
        if built is None:
            weights.append(experts.plain())
        else:
            assemblies.append(built)
    return weights, assemblies


def _with_tables(
    wants: WantedWeights, tied: tuple[str, str] | None, assembler: "_Assembler | None"
) -> list[LinearWeights]:
    """The linears and the tables, without a head that is the embedding's quantized matrix."""
    head = None
    if tied is not None and assembler is not None and assembler.has_only(tied[1], tied[0]):
        head = next(linear for linear in wants.linears if linear.rows[0][0] == tied[0])

    def with_head(table: LinearWeights) -> LinearWeights:
        if head is None or tied is None or table.rows[0][0] != tied[1]:
            return table

        def deliver(matrix: Matrix) -> None:
            table.deliver(matrix)
            head.deliver(matrix)

        return replace(table, deliver=deliver)

    return [*(linear for linear in wants.linears if linear is not head), *map(with_head, wants.tables)]


class _Assembler:
    """Finds the quantized linears of one checkpoint."""

    def __init__(self, quantization: Quantization, names: FileNames, device: torch.device) -> None:
        self.found, self.names, self.device = quantization, names, device

    def has_only(self, one: str, other: str) -> bool:
        """Whether the files have one linear, quantized, and nothing of another."""
        return self._module(one) is not None and self.names.find([f"{other}.weight"]) is None

    def linear(self, wanted: LinearWeights) -> Assembly | None:
        """None when all of it is plain."""
        found = [part for row, own in zip(wanted.rows, wanted.own, strict=True) for part in self._split(*row, own)]
        if not any(self._module(name) for name, _, _ in found):
            return None
        rows = [(name, count, span) for name, count, spans in found for span in spans]
        others = {tensor for name, _, spans in found if not spans for tensor in self._tensors(name)}
        sources = tuple(
            self._source(row, wanted.width, wanted.has_bias, take)
            for row, take in zip(rows, self._places(rows), strict=True)
        )

        def deliver(built: Sequence[tuple[Piece, Tensor | None]], hold: Hold) -> None:
            pieces, all_outputs = [piece for piece, _ in built], sum(count for _, count in wanted.rows)
            wanted.deliver(hold(side_by_side(pieces, self.device, all_outputs=all_outputs)))
            if any(bias is not None for _, bias in built):
                biases = [
                    torch.zeros(s.num_outputs, device=self.device) if b is None else b
                    for s, (_, b) in zip(sources, built, strict=True)
                ]
                wanted.deliver_bias(torch.cat(biases))

        return Assembly(sources, deliver, others=frozenset(others))

    def experts(self, wanted: ExpertWeights) -> Assembly | None:
        """None when all of it is plain."""
        count, _, width = wanted.shape
        for parts in wanted.split:
            if self._module(wanted.module(0, parts[0])) is None:
                continue
            found: list[Source] = []
            for expert in range(count):
                rows = [(name, size, span) for name, size, spans in wanted.named(expert, parts) for span in spans]
                for row, take in zip(rows, self._places(rows), strict=True):
                    found.append(self._source(row, width, False, take))
            sources = tuple(found)
            deliver = partial(self._deliver_experts, wanted, sources, len(sources) // count)
            return Assembly(sources, deliver, are_experts=True)
        return None

    def _deliver_experts(
        self,
        wanted: ExpertWeights,
        sources: Sequence[Source],
        step: int,
        built: Sequence[tuple[Piece, Tensor | None]],
        hold: Hold,
    ) -> None:
        """Hand over a matrix for each expert, of `step` pieces. Raises BackendError for biases, which experts lack."""
        for source, (_, bias) in zip(sources, built, strict=True):
            if bias is not None:
                name = source.tensors[-1]
                file = self.found.checkpoint.tensors[name].file
                raise BackendError(f"{file}: tensor {name!r} must be all zero: experts of this model add no bias")
        pieces = [piece for piece, _ in built]
        groups = [pieces[i : i + step] for i in range(0, len(pieces), step)]
        _, all_outputs, _ = wanted.shape
        together = [side_by_side(group, self.device, is_expert=True, all_outputs=all_outputs) for group in groups]
        wanted.deliver(together)

    def _split(self, name: str, count: int, own: Spans) -> list[tuple[str, int, Spans]]:
        """The linears that files have for one of the model's, and what of each is a rank's own."""
        prefix, _, last = name.rpartition(".")
        modules = [self._module(f"{prefix}.{part}") for part in SPLIT.get(last, ())]
        if not modules or None in modules or self._module(name) is not None:
            return [(name, count, own)]
        sizes = [self.found.format.size(self.found.packed(module))[1] for module in modules if module is not None]
        starts = accumulate(sizes, initial=0)
        return [
            (f"{prefix}.{part}", size, within(own, start, start + size))
            for part, size, start in zip(SPLIT[last], sizes, starts, strict=False)
        ]

    def _tensors(self, name: str) -> tuple[str, ...]:
        """Those that the files have for a quantized linear."""
        module = self._module(name)
        assert module is not None
        bias = f"{module}.bias"
        return *self.found.tensors(module), *([bias] if bias in self.found.checkpoint.tensors else [])

    def _module(self, name: str) -> str | None:
        """What the files call a quantized linear; None when there is no such."""
        for part in self.found.format.parts:
            found = self.names.find([f"{name}.{part}"])
            if found is not None and self.found.format.holds(self.found.checkpoint.tensors[found[0]]):
                return found[0].removesuffix(f".{part}")
        return None

    def _places(self, rows: Sequence[Row]) -> list[Take]:
        """Where the codes of linears go: side by side if they may become one matrix, as `side_by_side` makes it."""
        form, modules = self.found.format, [self._module(name) for name, _, _ in rows]
        apart: list[Take] = [new_tiles for _ in rows]
        counts = [end - begin for _, _, (begin, end) in rows]
        if not form.codes or None in modules or any(count % TILE for count in counts[:-1]):
            return apart
        dim, packed = form.inputs_dim, [self.found.packed(module) for module in modules if module is not None]
        if any(not one.has(form.codes) for one in packed):
            return apart  # What is missing is said by the format's own check.
        if len({one.entry(form.codes).shape[dim : dim + 1] for one in packed}) > 1:
            return apart
        starts = [0, *accumulate(-(-count // TILE) for count in counts)]
        room = Room(starts.pop())
        return [partial(room.take, start) for start in starts]

    def _source(self, row: Row, inputs: int, has_bias: bool, take: Take) -> Source:
        """A linear of the files, checked as far as headers tell."""
        name, whole, (begin, end) = row
        module = self._module(name)
        if module is None:
            return self._plain(row, inputs, has_bias)
        format, packed = self.found.format, replace(self.found.packed(module, self.device), take=take)
        format.check(packed, inputs, whole)
        tensors, outputs = self.found.tensors(module), end - begin
        if has_bias or packed.has("bias"):
            # EXL2 fills up a bias as it does the outputs.
            stored = format.size(packed)[1] if packed.shape("bias", 1) != (whole,) else whole
            packed.expect("bias", (stored,), "F16", "BF16", "F32")
            tensors = (*tensors, packed.name("bias"))
        if outputs < whole:
            packed = replace(packed, own=(begin, end))
        reads = format.reads(packed)
        if packed.has("bias"):
            entry = packed.entry("bias")
            reads += entry.ranges([(begin, end)], entry.shape[0])

        def build() -> tuple[Piece, Tensor | None]:
            bias = packed.contents("bias")[begin:end].float() if packed.has("bias") else None
            if bias is not None and not has_bias and not bool(bias.any()):
                bias = None  # AutoGPTQ writes zeros where the model has none.
            return format.build(packed, inputs, outputs), None if bias is None else bias.to(self.device)

        bias = (4 * outputs,) if has_bias else ()
        on_card = (inputs // 8, SHARES_BYTES) if self.device.type != "cpu" else ()  # See ColumnMatrix.group_of.
        num_bytes = (*format.tensor_bytes(packed), *bias, *on_card)
        return Source(tensors, tuple(reads), outputs, num_bytes, build)

    def _plain(self, row: Row, inputs: int, has_bias: bool) -> Source:
        """A linear left as it was among others that are quantized."""
        name, whole, own = row
        packed = replace(self.found.packed(self.names.of(name), self.device), own=own)
        packed.expect("weight", (whole, inputs), "F16", "BF16", "F32")
        if has_bias:
            packed.expect("bias", (whole,), "F16", "BF16", "F32")

        def build() -> tuple[Piece, Tensor | None]:
            return packed.rows("weight").clone(), packed.rows("bias").float() if has_bias else None

        parts = ("weight", "bias") if has_bias else ("weight",)
        reads = tuple(chain.from_iterable(packed.entry(part).ranges([own], whole) for part in parts))
        num_bytes = tuple(packed.share_of(packed.entry(part).num_bytes, whole) for part in parts)
        return Source(tuple(map(packed.name, parts)), reads, own[1] - own[0], num_bytes, build)
