"""The MLPs of a decoder layer."""

from torch import Tensor, nn

from tightrope.backends.hf.modules.linear import Linear
from tightrope.kernels import dispatch


class MLP(nn.Module):
    """What our layer has behind its attention: rows of hidden states in, and out."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(x.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden], which each kind below computes in its own way."""
        raise NotImplementedError


class GatedMLP(MLP):
    """down(activation(gate(x)) * up(x)), gate and up as one linear. sizes: the ranks' columns between the two."""

    def __init__(self, gate_up: Linear, down: Linear, activation: str, sizes: tuple[int, ...] | None) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation, self.sizes = gate_up, down, activation, sizes

    def run(self, x: Tensor) -> Tensor:
        middle = dispatch.gated(self.gate_up.run(x), self.activation)
        return self.down.run(self.gate_up.current.gathered(middle, self.sizes))


class Unbatched(MLP):
    """A module of transformers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        output = self.module(x.unsqueeze(0))
        assert isinstance(output, Tensor)  # Its layer would have been left as it is otherwise.
        return output.view(x.shape)
