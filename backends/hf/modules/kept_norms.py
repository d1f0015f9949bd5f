"""Norms of classes that aren't ours: rows of a step may have weights of adapters in them, too."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.backends.hf.modules.step import CurrentStep


class KeptNorm:
    """A module of transformers or torch that norms the last dimension of x [1, T, hidden], row by row."""

    def __init__(self, name: str, module: nn.Module, current: CurrentStep) -> None:
        self.name, self.module, self.current = name, module, current
        self.replaced: dict[int, nn.Module] = {}  # By slot.
        module.register_forward_hook(self._replace)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Of its weight, and of its bias if it has one."""
        return {part: len(tensor) for part, tensor in self.module.named_parameters(recurse=False)}

    def with_weights(self, own: Mapping[str, Tensor]) -> nn.Module:
        """The same norm with some of its weights replaced."""
        theirs = dict(self.module.named_parameters(recurse=False))
        other = copy.copy(self.module)
        other._parameters = dict(self.module._parameters)
        for part, tensor in own.items():
            other._parameters[part] = nn.Parameter(tensor.to(theirs[part]), requires_grad=False)
        return other

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = self.current.adapters
        if rows is None or not self.replaced:
            return output
        x, out = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]).clone()
        rows.check(len(x), self.name)
        for slot in self.replaced.keys() & set(rows.present):
            mine = (rows.slots == slot).nonzero()[:, 0]
            own: Tensor = self.replaced[slot].forward(x[mine])  # A call would come here again.
            out[mine] = torch.lerp(out[mine], own.to(out.dtype), rows.scales[mine].to(out.dtype).unsqueeze(1))
        return out.view(output.shape)


def is_kept_norm(module: nn.Module, hidden_size: int) -> bool:
    """Whether a module is a norm with a weight, and perhaps a bias, for each number of the hidden state."""
    weights = dict(module.named_parameters(recurse=False))
    is_leaf = next(module.children(), None) is None and weights.keys() in ({"weight"}, {"weight", "bias"})
    return is_leaf and "Norm" in type(module).__name__ and all(w.shape == (hidden_size,) for w in weights.values())
