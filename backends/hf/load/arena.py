"""One block of a card's memory for all weights.

Torch's allocator rounds large ones up to whole mebibytes, hundreds of MiB for a model, and whatever loading needs for a
moment would lie between them. In one block they lie side by side, and the rest goes back to the card.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from tightrope.backends.allocator import ROUND
from tightrope.backends.hf.modules.matrices import Exllama

Held = TypeVar("Held")


def arena_bytes(sizes: Sequence[int]) -> int:
    """Bytes of the block for weights of these sizes."""
    return sum(-(-size // ROUND) * ROUND for size in sizes)


class Arena:
    """What doesn't fit into it, as headers told too little of its size, has memory of its own."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._free = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device, not filled."""
        size = prod(shape) * dtype.itemsize
        whole = -(-size // ROUND) * ROUND
        if whole > len(self._free):
            return torch.empty(tuple(shape), dtype=dtype, device=self._free.device)
        own, self._free = self._free[:size], self._free[whole:]
        return own.view(dtype).view(tuple(shape))

    def holding(self, value: Held) -> Held:
        """The same matrix, or whatever is made of tensors, with them here; what shared memory shares it again."""
        return self._moved(value, {})

    def _moved(self, value: Held, done: dict[int, Tensor]) -> Held:
        """done: the bytes of each memory that has been copied, by its address among torch's objects."""
        if isinstance(value, Tensor):
            return self._copied(value, done)  # type: ignore[return-value]  # a tensor for a tensor
        if isinstance(value, tuple):
            return tuple(self._moved(part, done) for part in value)  # type: ignore[return-value]  # a tuple for one
        if is_dataclass(value) and not isinstance(value, type | Exllama):  # An extension has the addresses of those.
            parts = {field.name: self._moved(getattr(value, field.name), done) for field in fields(value)}
            return replace(value, **parts)
        return value

    def _copied(self, tensor: Tensor, done: dict[int, Tensor]) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device != self._free.device or not storage.nbytes():
            return tensor
        if storage._cdata not in done:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            done[storage._cdata] = self.empty(whole.shape, torch.uint8).copy_(whole)
        mine = done[storage._cdata].view(tensor.dtype)
        return mine.as_strided(tensor.shape, tensor.stride(), mine.storage_offset() + tensor.storage_offset())
