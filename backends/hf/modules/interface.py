"""transformers' attention interface: what an untouched attention module asks, and who answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

INTERFACE = "tightrope"  # This is our name among transformers' attention implementations.


class AttentionCall(ABC):
    """What stands behind the attention interface in one module: called with queries, keys, values and a mask."""

    @abstractmethod
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, **settings: object
    ) -> tuple[Tensor, None]:
        """query [1, H, T, D], key and value [1, Hkv, T, D] to [1, T, H, D]."""


def answer_with(module: nn.Module, attend: AttentionCall) -> Callable[[], None]:
    """Let `attend` compute whatever `module` asks of the attention interface. Returns what takes it away again."""
    module.__dict__["attend"] = attend

    def remove() -> None:
        del module.__dict__["attend"]

    return remove


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    **settings: object,
) -> tuple[Tensor, None]:
    attend: AttentionCall = module.__dict__["attend"]
    return attend(query, key, value, attention_mask, **settings)


class Mask:
    """Which tokens a token sees, as transformers describes it; never materialised."""

    def __init__(self, is_seen: Callable[[int, int, Tensor, Tensor], Tensor]) -> None:
        self._is_seen = is_seen

    def sees(self, query: int, key: int) -> bool:
        """Whether the token at position `query` sees the one at `key`."""
        return bool(self._is_seen(0, 0, torch.tensor(query), torch.tensor(key)))


def _mask(*, mask_function: Callable[[int, int, Tensor, Tensor], Tensor], **sizes: object) -> Mask:
    """In place of a mask: attention knows causality and window from the layer's AttentionSpec."""
    return Mask(mask_function)


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)
