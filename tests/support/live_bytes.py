"""What torch holds at a time: a mode that follows each storage from the operator that makes it to its end."""

from collections.abc import Callable, Iterable
from weakref import WeakSet, finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`most` is the largest measure of what was live at the same time: of the sizes in bytes, in the order of birth."""

    def __init__(self, measure: Callable[[Iterable[int]], int] = sum) -> None:
        super().__init__()
        self.most = 0
        self._measure = measure
        self._live: dict[int, int] = {}  # Sizes by numbers that rise.
        self._number = 0
        self._seen: WeakSet[torch.UntypedStorage] = WeakSet()

    @property
    def live(self) -> list[int]:
        """The sizes of what is live now."""
        return list(self._live.values())

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, Tensor):
                self._seen.add(tensor.untyped_storage())  # It was there before.
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._number += 1
                self._live[self._number] = storage.nbytes()
                finalize(storage, self._live.pop, self._number)
                self.most = max(self.most, self._measure(self._live.values()))
        return result
