"""Where a model's layers lie, on cards or in the host's memory, what that takes, and how much cache fits beside them.

llama.cpp puts the last layers on cards, the output behind them first; keys and values lie where their layer does, and
the table of the tokens' embeddings always in the host's memory.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from tightrope.backends.devices.host import look
from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header
from tightrope.backends.gguf.cache_types import CACHE_TYPES, CacheType
from tightrope.backends.gguf.cards import Card, cards_for, chosen_of, unused
from tightrope.backends.gguf.native import MAX_SEQS
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.gguf.split import ROUNDED_ROWS, by_proportion, pieces, spread
from tightrope.backends.memory import CARD_RESERVE, MEMORY_SHARE, CardMemory, free_for, grossed_up
from tightrope.backends.settings import MAX_TOKENS, ModelSettings

CELL_GRAIN = 256  # Llama.cpp rounds the number of cells up to this.
KEPT_SLOTS = 48  # So many finished sequences may be kept at most, as llama.cpp's work a step grows with the slots.
KEPT_STATE_BYTES = 512 << 20  # So much may their recurrent states take, which each slot has, in use or not.
MAX_OUTPUTS = 128  # One native call gives so many rows of logits, for which a buffer is allocated.
# Names of the tensors that hold all experts of a layer; llama.cpp's own --n-cpu-moe goes by them.
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
FIXED_BYTES = 64 << 20
MASK_BYTES = 2  # Flash attention's mask has 16 bits for each token of a step and each cell.
_INPUTS = ("token_embd", "per_layer_token_embd", "position_embd", "token_types")


@dataclass(frozen=True, slots=True)
class Slot:
    """A layer, or the output: what makes logits of the last layer's result. Sizes in bytes."""

    weight_bytes: int = 0
    expert_bytes: int = 0  # They are a part of `weight_bytes`.
    copied_bytes: int = 0  # On a card it takes these more: a copy of the embedding, where that is the output's matrix.
    largest_bytes: int = 0  # That of the largest tensor.
    matrix_bytes: int = 0  # A part of these: matrices whose rows several cards may share.
    row_bytes: int = 0  # One row of each of these.
    kv_heads: int = 0
    state_bytes: int = 0  # A recurrent layer keeps these for all sequences, whatever the length of the cache.


@dataclass(frozen=True, slots=True)
class Memory:
    """What is free; `cards` are those that layers are put on. unused: what to say of one that nothing is put on."""

    host_bytes: int
    cards: tuple[Card, ...] = ()
    unused: str = ""

    @property
    def host_room(self) -> int:
        """Bytes of the host's memory that may be filled."""
        return int(self.host_bytes * MEMORY_SHARE)


@dataclass(frozen=True, slots=True)
class Layout:
    """A model in a memory, with its last `num_on_cards` slots on the cards."""

    shape: ModelShape
    memory: Memory
    input_bytes: int
    slots: tuple[Slot, ...]
    num_on_cards: int
    card_fraction: float  # Of each card's whole memory so much may be taken.
    num_cpu_experts: int  # The experts of so many layers, from the first on, stay in the host's memory.
    step_tokens: int
    max_outputs: int
    max_seqs: int  # Of the context: those that run, and finished ones.
    run_bytes: int  # Of the host's memory these are kept for finished sequences outside the cache.
    half_bytes: int = 0  # That of the largest matrix that a card unpacks to 16 bits for a prompt.
    proportions: tuple[float, ...] = ()  # What cards get of the slots there; none: what has room.
    has_split_rows: bool = False  # All cards share each matrix, its rows by these; else each has slots of its own.

    @classmethod
    def of(cls, settings: ModelSettings, header: Header, memory: Memory, adapter_bytes: int = 0) -> "Layout":
        """Adapters lie beside the weights that they change, and are counted with all layers alike."""
        shape = ModelShape.of(header)
        kept = min(KEPT_SLOTS, max(1, KEPT_STATE_BYTES // shape.state_bytes)) if shape.state_bytes else KEPT_SLOTS
        max_seqs = min(MAX_SEQS, settings.max_num_seqs + kept)
        slots = _slots(header, shape, -(-adapter_bytes // len(shape.kv_heads)), max_seqs)
        asked = len(slots) if settings.gpu_layers < 0 else min(settings.gpu_layers, len(slots))
        return cls(
            shape=shape,
            memory=memory,
            input_bytes=sum(tensor.num_bytes for tensor in header.tensors if tensor.name.startswith(_INPUTS)),
            slots=slots,
            num_on_cards=asked if memory.cards else 0,
            card_fraction=settings.gpu_memory_fraction,
            num_cpu_experts=min(settings.n_cpu_moe, len(shape.kv_heads)),
            step_tokens=settings.step_tokens_on("cpu"),
            max_outputs=max(settings.max_num_seqs, min(MAX_OUTPUTS, settings.step_tokens_on("cpu"))),
            max_seqs=max_seqs,
            run_bytes=settings.cache.host_reserve_bytes,
            half_bytes=_half_bytes(header, memory.cards),
            proportions=settings.tensor_split,
            has_split_rows=settings.split_mode == "row",
        )

    @property
    def device(self) -> str:
        """Whose memory the layers take: "cpu", or a library of llama.cpp's for cards."""
        return self.memory.cards[0].name.rstrip("0123456789").lower() if self.num_on_cards else "cpu"

    @property
    def usable_bytes(self) -> int:
        """What may be taken there, of all cards together."""
        if not self.num_on_cards:
            return self.memory.host_room
        return sum(card.memory.usable_bytes(self.card_fraction) for card in self.memory.cards)

    @property
    def _first(self) -> int:
        """The first slot that is on a card."""
        return len(self.slots) - self.num_on_cards

    @property
    def card_weight_bytes(self) -> int:
        """Weights on all cards together, and recurrent states."""
        return sum(self._costs(0, CACHE_TYPES["f16"]))

    @property
    def host_weight_bytes(self) -> int:
        """Weights in the host's memory."""
        left = sum(slot.expert_bytes for slot in self.slots[self._first : self.num_cpu_experts])
        return self.input_bytes + sum(slot.weight_bytes for slot in self.slots[: self._first]) + left

    @property
    def host_tensors(self) -> str | None:
        """A regular expression for the tensors of layers on cards that stay in the host's memory; None if all go."""
        if not (self.num_cpu_experts and self.num_on_cards):
            return None
        return rf"blk\.({'|'.join(map(str, range(self.num_cpu_experts)))}){EXPERTS}"

    def token_bytes(self, kind: CacheType) -> float:
        """Bytes of a token's keys and values in all layers; 0 for a model without attention."""
        return self.shape.cache_bytes(kind.key_type, kind.value_type)

    def workspace_bytes(self, num_cells: int) -> int:
        """A bound on llama.cpp's buffers of a step and of its results in the host's memory."""
        return self._logit_bytes + self._step_bytes(num_cells) + FIXED_BYTES

    def card_workspace_bytes(self, num_cells: int, kind: CacheType) -> int:
        """A bound on the buffers of a step on a card.

        It unpacks a layer's quantized cache to 16 bits for the attention of a prompt, and is sent the matrices that lie
        in the host's memory one by one for a prompt's products. What it unpacks for cuBLAS is counted with these.
        """
        heads = max(self.shape.kv_heads) * (self.shape.key_dim + self.shape.value_dim)
        unpacked = 2 * num_cells * heads if kind.is_quantized else 0
        left = [slot.largest_bytes for slot in (*self.slots[: self._first], *self.slots[: self.num_cpu_experts])]
        # Each card is sent a step's activations, and what it makes of them is put together on one.
        gathered = 4 * self.step_tokens * self.shape.step_width if self.has_split_rows else 0
        return self._step_bytes(num_cells) + unpacked + max(left, default=0) + self.half_bytes + gathered

    @property
    def _logit_bytes(self) -> int:
        return 4 * self.max_outputs * self.shape.vocab_size

    def _step_bytes(self, num_cells: int) -> int:
        """Logits, activations in float32, and masks."""
        masks = MASK_BYTES * self.step_tokens * num_cells * self.shape.num_masks
        return self._logit_bytes + 4 * self.step_tokens * self.shape.step_width + masks

    def host_need(self, num_cells: int, kind: CacheType) -> int:
        """Bytes of the host's memory, and of that which integrated cards take of it."""
        need = self.host_weight_bytes + self.workspace_bytes(num_cells) + self.run_bytes
        need += sum(self._kept_bytes(slot, num_cells, kind) for slot in self.slots[: self._first])
        if any(card.shares_host for card in self.memory.cards):
            need += self.card_need(num_cells, kind) + self.card_workspace_bytes(num_cells, kind)
        return need

    def card_need(self, num_cells: int, kind: CacheType) -> int:
        """Bytes of weights and cache on all cards together."""
        return sum(self._costs(num_cells, kind))

    def fits(self, num_cells: int, kind: CacheType) -> bool:
        """Whether all has room with a cache of so many cells."""
        if self.host_need(num_cells, kind) > self.memory.host_room:
            return False
        return not self.num_on_cards or bool(self.counts(num_cells, kind))

    def counts(self, num_cells: int, kind: CacheType) -> tuple[int, ...]:
        """How many slots each card takes, in order; () where there are none, or they have no room."""
        if not self.num_on_cards:
            return ()
        rooms = self.card_rooms(num_cells, kind)
        if not (self.proportions or self.has_split_rows):
            return spread(self._costs(num_cells, kind), rooms)
        counts = self.fixed_counts(num_cells, kind)
        taken = self.taken(counts, num_cells, kind)
        return counts if all(size <= room for size, room in zip(taken, rooms, strict=True) if size) else ()

    def fixed_counts(self, num_cells: int, kind: CacheType) -> tuple[int, ...]:
        """Those that the proportions give, or what cards have free where rows are split, whether they fit or not."""
        rooms = [float(max(0, room)) for room in self.card_rooms(num_cells, kind)]
        given = self.proportions or (rooms if any(rooms) else [1.0] * len(rooms))
        return by_proportion(given, self.num_on_cards, len(rooms))

    def card_fillings(self, counts: Sequence[int], num_cells: int, kind: CacheType) -> list[int]:
        """Bytes of each card that are planned for, with so many slots on each."""
        workspace = self.card_workspace_bytes(num_cells, kind) + CARD_RESERVE
        return [size + workspace for size in self.taken(counts, num_cells, kind)]

    def taken(self, counts: Sequence[int], num_cells: int, kind: CacheType) -> list[int]:
        """Bytes of weights and cache on each card."""
        costs = self._costs(num_cells, kind)
        if not self.has_split_rows:
            return pieces(costs, counts)
        on_cards = self.slots[self._first :]
        own = [cost - slot.matrix_bytes for cost, slot in zip(costs, on_cards, strict=True)]
        shared = sum(slot.matrix_bytes for slot in on_cards)
        rounded = ROUNDED_ROWS * sum(slot.row_bytes for slot in on_cards)
        parts = [-(-shared * count // self.num_on_cards) + (rounded if count else 0) for count in counts]
        return [one + part for one, part in zip(pieces(own, counts), parts, strict=True)]

    def card_rooms(self, num_cells: int, kind: CacheType) -> list[int]:
        """Bytes of each card that weights and cache may fill."""
        workspace = self.card_workspace_bytes(num_cells, kind)
        return [card.memory.usable_bytes(self.card_fraction) - workspace for card in self.memory.cards]

    def fitting_tokens(self, kind: CacheType) -> int:
        """The most tokens of cache that fit, in whole grains."""
        fits, most = 0, MAX_TOKENS // CELL_GRAIN
        if not self.fits(0, kind):
            return 0
        while fits < most:
            middle = (fits + most + 1) // 2
            fits, most = (middle, most) if self.fits(middle * CELL_GRAIN, kind) else (fits, middle - 1)
        return fits * CELL_GRAIN

    def most_on_cards(self, num_cells: int, kind: CacheType) -> int:
        """The most slots, fewer than now, that can be on cards with a cache of so many cells; 0 where none can."""
        fewer = (replace(self, num_on_cards=number) for number in range(self.num_on_cards - 1, 0, -1))
        return next((layout.num_on_cards for layout in fewer if layout.fits(num_cells, kind)), 0)

    def least_on_cards(self, num_cells: int, kind: CacheType) -> int:
        """The fewest slots, more than now, that must be on cards for a cache of so many cells; 0 where none fit."""
        more = (replace(self, num_on_cards=number) for number in range(self.num_on_cards + 1, len(self.slots) + 1))
        return next((layout.num_on_cards for layout in more if layout.fits(num_cells, kind)), 0)

    def least_cpu_experts(self, num_cells: int, kind: CacheType) -> int:
        """The least number of layers whose experts, left in the host's memory, make it fit; 0 where none does."""
        more = (replace(self, num_cpu_experts=number) for number in range(self.num_cpu_experts + 1, len(self.slots)))
        return next((layout.num_cpu_experts for layout in more if layout.fits(num_cells, kind)), 0)

    def _costs(self, num_cells: int, kind: CacheType) -> list[int]:
        """Bytes of weights and cache on a card, for each slot there."""
        return [
            slot.weight_bytes
            + slot.copied_bytes
            - (slot.expert_bytes if number < self.num_cpu_experts else 0)
            + self._kept_bytes(slot, num_cells, kind)
            for number, slot in enumerate(self.slots[self._first :], self._first)
        ]

    def _kept_bytes(self, slot: Slot, num_cells: int, kind: CacheType) -> int:
        """Keys and values of a slot, and recurrent states."""
        return slot.state_bytes + int(num_cells * slot.kv_heads * self.shape.head_bytes(kind.key_type, kind.value_type))


def _slots(header: Header, shape: ModelShape, adapter_bytes: int, max_seqs: int) -> tuple[Slot, ...]:
    layers = len(shape.kv_heads)
    weights, experts, largest, matrices, rows = ([0] * (layers + 1) for _ in range(5))
    shapes = {tensor.name: tensor.dims for tensor in header.tensors}
    sizes = {tensor.name: tensor.num_bytes for tensor in header.tensors}
    for name, size in sizes.items():
        if name.startswith(_INPUTS):
            continue
        match = re.match(r"blk\.(\d+)\.", name)
        slot = min(int(match[1]), layers) if match else layers
        weights[slot] += size
        experts[slot] += size if re.search(EXPERTS, name) else 0
        largest[slot] = max(largest[slot], size)
        if len(shapes[name]) == 2 and shapes[name][1] > 1:  # Experts have three dimensions, and stay whole.
            matrices[slot] += size
            rows[slot] += size // shapes[name][1]
    copied = 0 if "output.weight" in sizes else sizes.get("token_embd.weight", 0)
    blocks = [
        Slot(
            weight_bytes=weights[number] + adapter_bytes,
            expert_bytes=experts[number],
            largest_bytes=largest[number],
            kv_heads=shape.kv_heads[number],
            state_bytes=4 * max_seqs * shape.state_values[number],
            matrix_bytes=matrices[number],
            row_bytes=rows[number],
        )
        for number in range(layers)
    ]
    if copied:
        matrices[layers] += copied
        rows[layers] += copied // shapes["token_embd.weight"][-1]
    output = Slot(
        weights[layers],
        copied_bytes=copied,
        largest_bytes=max(largest[layers], copied),
        matrix_bytes=matrices[layers],
        row_bytes=rows[layers],
    )
    return (*blocks, output)


def _half_bytes(header: Header, cards: Sequence[Card]) -> int:
    """Bytes in float16 of the largest matrix that cards can't multiply as it is; experts are unpacked one by one."""
    types = {tensor.type_name for tensor in header.tensors}
    unpacked = {name for name in types if not all(card.multiplies(name) for card in cards)}
    return max((2 * prod(t.dims[:2]) for t in header.tensors if t.type_name in unpacked), default=0)


def memory_of(settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None) -> Memory:
    """What is free here, or what is named instead: bytes of the host's memory, all of which may be filled, and bytes
    that a driver would call free on each card. Raises BackendError."""
    count = settings.tensor_parallel
    if count > 1 or (count < 0 and settings.gpu_layers):
        raise BackendError(
            f"--tensor-parallel {count if count > 0 else 'all'}: llama.cpp, which runs this GGUF file, has no ranks; "
            "--gpu-layers -1 --split-mode row shares each matrix out among cards"
        )
    host = free_for(settings) if memory_bytes is None else grossed_up(memory_bytes)
    if device_bytes is None:
        return Memory(host, cards_for(settings), unused(settings, look()) if memory_bytes is None else "")
    if settings.gpu_layers == 0:
        raise BackendError("no layer is put on a card unless --gpu-layers says how many; add --gpu-layers -1 for all")
    cards = [Card(f"CUDA{n}", CardMemory(size, size)) for n, size in enumerate(device_bytes)]
    return Memory(host, chosen_of(cards, settings))
