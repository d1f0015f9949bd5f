"""The gated MLP of a decoder layer."""

from torch import Tensor, nn

from tightrope.backends.hf.modules.linear import Linear
from tightrope.kernels import dispatch


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up as one linear."""

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(x.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self.down.run(dispatch.gated(self.gate_up.run(x), self.activation))
