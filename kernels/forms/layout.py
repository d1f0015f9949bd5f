"""What kernels read and write: a layer's cached keys and values, a step's sequences, and rotary angles.

Fixed letters: T tokens in the step, B sequences, P pages, H query heads, Hkv key and value heads, D head dimension,
R rotated dimensions (R <= D).
"""

import math
import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

PAGE = 16  # Tokens in a page of the cache.
GROUP = 32  # Values that share a scale.
LARGE = 1 << 18  # Bytes of the smallest tensor that is mapped by itself.

CacheDtype = Literal["q8", "q4", "f16"]


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How one layer's keys and values are stored."""

    dtype: CacheDtype
    num_kv_heads: int
    head_dim: int

    @property
    def num_groups(self) -> int:
        """Scales of one head of one token; a last group may be partly empty."""
        return -(-self.head_dim // GROUP)

    @property
    def code_bytes(self) -> int:
        """Bytes of one head of one token, without its scales."""
        if self.dtype == "f16":
            return 2 * self.head_dim
        return self.num_groups * (GROUP if self.dtype == "q8" else GROUP // 2)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in this layer."""
        scales = 0 if self.dtype == "f16" else 2 * self.num_groups
        return 2 * self.num_kv_heads * (self.code_bytes + scales)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in this layer."""
        return PAGE * self.bytes_per_token


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LayerCache:
    """One layer's pages.

    codes: f16 float16 [P, Hkv, PAGE, D]; q8 int8 [P, Hkv, PAGE, G * 32]; q4 uint8 [P, Hkv, PAGE, G * 16], where byte j
    of a group's sixteen holds value j in its low and value j + 16 in its high four bits. scales: float16
    [P, Hkv, PAGE, G], empty for f16. A q8 value is code * scale, a q4 value (code - 8) * scale. Keys are stored before
    rotation and divided by `key_factor` [Hkv, D] float32 (ones for f16 and where keys are cached rotated). is_windowed:
    its pages are those of StepLayout.windowed.
    """

    format: CacheFormat
    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor
    key_factor: Tensor
    is_windowed: bool = False

    @classmethod
    def allocate(
        cls, format: CacheFormat, num_pages: int, device: torch.device | str = "cpu", *, is_windowed: bool = False,
        memory: Tensor | None = None,
    ) -> "LayerCache":  # fmt: skip
        """Zeroed pages, with factors of one.

        memory: uint8 of that device, of page_bytes for each page, to put them into instead of zeroed memory of their
        own. Raises RuntimeError or OSError where there is no memory for them.
        """
        code_dtype, width = {
            "f16": (torch.float16, format.head_dim),
            "q8": (torch.int8, format.code_bytes),
            "q4": (torch.uint8, format.code_bytes),
        }[format.dtype]
        groups = 0 if format.dtype == "f16" else format.num_groups
        shape = (num_pages, format.num_kv_heads, PAGE)

        shapes = ((*shape, width), code_dtype), ((*shape, groups), torch.float16)
        tensors: list[Tensor] = []
        for place, dtype in (*shapes, *shapes):
            if memory is None:
                tensors.append(_zeros(place, dtype, device))
            else:
                size = math.prod(place) * dtype.itemsize
                tensors.append(memory[:size].view(dtype).view(place))
                memory = memory[size:]
        factor = torch.ones(format.num_kv_heads, format.head_dim, device=device)
        key_codes, key_scales, value_codes, value_scales = tensors
        return cls(format, key_codes, key_scales, value_codes, value_scales, factor, is_windowed)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What holds a place for each token: codes and scales of keys and of values."""
        return self.key_codes, self.key_scales, self.value_codes, self.value_scales

    def touch(self) -> None:
        """Write to all pages, after which the memory that the system promised is there."""
        for tensor in self.stored:
            tensor.zero_()

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages [n] int64: what `copy_slots` does for their slots, in two thirds of its time."""
        for tensor in self.stored:
            tensor[targets] = tensor[sources]

    def copy_slots(self, sources: Tensor, targets: Tensor) -> None:
        """Copy single tokens from slots [n] int64 to slots [n], as StepLayout numbers them, bit for bit.

        All are read before the first is written, so that they may overlap in any way; no target may stand there twice.
        """
        from_rows, to_rows = self._rows(sources), self._rows(targets)
        for tensor in self.stored:
            if tensor.numel():
                rows = _words(tensor.view(-1, tensor.shape[-1]))  # [P * Hkv * PAGE, words]
                rows[to_rows] = rows[from_rows]

    def _rows(self, slots: Tensor) -> Tensor:
        """Where all heads of slots [n] lie among those of all pages, [n * Hkv]."""
        num_heads = self.format.num_kv_heads
        heads = torch.arange(num_heads, device=slots.device)
        pages, places = (slots // PAGE).unsqueeze(1), (slots % PAGE).unsqueeze(1)
        return ((pages * num_heads + heads) * PAGE + places).flatten()


def _words(rows: Tensor) -> Tensor:
    """The same memory [n, W] as the widest numbers that fit a row, of which torch copies one at a time."""
    size = rows.shape[1] * rows.element_size()
    widths = torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8
    return rows.view(next(dtype for dtype in widths if size % dtype.itemsize == 0))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On Linux in pages of 2 MiB where the system has them: attention reads so much that looking up small ones tells.

    Their memory is taken when it is first written to, and neighbours share a page, so all is best allocated first.
    """
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or torch.device(device).type != "cpu" or size < LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # The system may have none.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class RopeTable:
    """Cosines and sines by which a position is rotated, split into the page that it is in and the place in the page.

    The angle of position p and pair i is p * inv_freq[i]; rotating by page p // PAGE and then by place p % PAGE gives
    it. Dimension i is paired with i + R/2. `pages` [S, P, 2, R/2] and `places` [S, PAGE, 2, R/2], float32, hold cosine
    and sine for each of S sets of frequencies; `set_of` [B] int32 says which set a sequence uses. `query_scale`
    [S] float32 multiplies the rotated part of queries: the square of the attention factor of YaRN and longrope.
    """

    pages: Tensor
    places: Tensor
    set_of: Tensor
    query_scale: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class StepLayout:
    """The sequences of one step, the same for all layers.

    Sequence b's tokens of this step are rows query_starts[b] .. query_starts[b + 1] of the step; with them its cache
    holds context_lens[b] tokens, so they are at positions context_lens[b] - n .. context_lens[b]. Position p of
    sequence b is in page block_tables[b, p // PAGE]. All on the device of the cache, but for the two maxima.

    `windowed` is the same step with the pages of sliding-window layers, where these have fewer: its block tables hold
    page 0 where no window reaches.

    `lengths` tells the host what query_starts and context_lens tell the device; without it long prompts are slower.
    `scratch` uint8 is memory that attention may write over, as large as expanded_cache_bytes of the longest sequence.
    """

    query_starts: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32
    block_tables: Tensor  # [B, pages of the longest] int32
    slots: Tensor  # [T] int64: page * PAGE + place, where this step's tokens are stored; those below 0 are not
    positions: Tensor  # [T] int32
    sequence_of: Tensor  # [T] int32: which b a row belongs to
    max_query_len: int
    max_context_len: int
    windowed: "StepLayout | None" = None
    lengths: tuple[tuple[int, int], ...] = ()  # [B]: tokens in this step, and cached with them
    scratch: Tensor | None = None

    def to(self, device: torch.device) -> "StepLayout":
        """The same in the memory of `device`; what `windowed` shares is moved once."""
        if self.slots.device == device:
            return self
        names = ("query_starts", "context_lens", "block_tables", "slots", "positions", "sequence_of")
        moved = replace(self, windowed=None, **{name: getattr(self, name).to(device) for name in names})
        if (other := self.windowed) is None:
            return moved
        block_tables, slots = other.block_tables.to(device), other.slots.to(device)
        return replace(moved, windowed=replace(moved, block_tables=block_tables, slots=slots))


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer's attention computes, beside its inputs."""

    scale: float  # The scores are multiplied by it.
    window: int | None = None  # A token sees itself and the window - 1 tokens before it.
    softcap: float | None = None  # Scores become softcap * tanh(scores / softcap).
