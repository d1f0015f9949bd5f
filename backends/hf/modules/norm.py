"""Root mean square norms, and those that adapters bring."""

import torch
from torch import Tensor, nn

from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.kernels import dispatch


class RMSNorm(nn.Module):
    """Root mean square norm; Gemma's one, `offset`, is in the weight. `replaced` are those of adapters, by slot."""

    weight: Tensor  # [N] float32

    def __init__(self, name: str, size: int, eps: float, offset: float, current: CurrentStep) -> None:
        super().__init__()
        self.name, self.size, self.eps, self.offset, self.current = name, size, eps, offset, current
        self.replaced: dict[int, Tensor] = {}
        self.runs_by_row = True  # Whether the first dimension of what `run` is given is that of a step's rows.

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(x.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, N], or [T, heads, N]."""
        out = dispatch.rms_norm(x.contiguous(), self.weight, self.eps)
        if self.replaced and (rows := self.current.adapters) is not None:
            rows.check(len(x), self.name)
            for slot in self.replaced.keys() & set(rows.present):
                mine = (rows.slots == slot).nonzero()[:, 0]
                own = dispatch.rms_norm(x[mine].contiguous(), self.replaced[slot], self.eps)
                out[mine] = torch.lerp(out[mine], own, rows.scales[mine].to(out.dtype).view(-1, *[1] * (x.dim() - 1)))
        return out

    @property
    def is_replaced(self) -> bool:
        """Whether a row of the step has another weight than ours."""
        rows = self.current.adapters
        return rows is not None and not self.replaced.keys().isdisjoint(rows.present)
