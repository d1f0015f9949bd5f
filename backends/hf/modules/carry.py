"""From one device to the next in the middle of a model whose layers lie on several."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.backends.hf.modules.step import CurrentStep


class Carry:
    """Brings hidden states to the device of the layers that follow, and has their kernels launched there.

    Between cards torch copies from one memory to the other, and the streams of both wait for it; from a card to the CPU
    and back the host waits. Hidden states are float32 on a CPU and of 16 bits on most cards: they are rounded where a
    card takes them over, and widened without loss where a CPU does.
    """

    def __init__(self, to: CurrentStep) -> None:
        self._to = to

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden], or whatever numbers a layer is given, where the following layers are."""
        to = self._to
        if to.device.type == "cuda":
            torch.cuda.set_device(to.device)  # Triton launches on the thread's own.
        return x.to(to.device, to.dtype if x.is_floating_point() else x.dtype)

    def before(self, layer: nn.Module) -> None:
        """Have it done with all tensors that a module of transformers is called with."""
        layer.register_forward_pre_hook(self._bring, with_kwargs=True)

    def _bring(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        brought: dict[str, Any] = {name: self._brought(value) for name, value in kwargs.items()}
        return self._brought(args), brought

    def _brought(self, value: Any) -> Any:  # noqa: ANN401 - arguments of transformers' many kinds
        if isinstance(value, Tensor):
            return self.run(value)
        return tuple(map(self._brought, value)) if type(value) is tuple else value


@contextmanager
def launching_on(device: torch.device) -> Iterator[None]:
    """Meanwhile kernels are launched on that card, until hidden states are carried to another; later as before."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
