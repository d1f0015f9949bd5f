"""Attention over our cache, in the place of transformers' attention modules or behind its attention interface."""

from torch import Tensor, nn

from tightrope.backends.hf.modules.interface import AttentionCall
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.norm import RMSNorm
from tightrope.backends.hf.modules.step import CurrentStep, LayerInfo
from tightrope.kernels import dispatch


class Attention(nn.Module):
    """Queries, keys and values by one linear, perhaps normed by head; keys go into the cache before rotation.

    `num_heads` are those of this rank, and `sizes` the ranks' numbers of columns between heads and the last linear.
    """

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        norms: tuple[RMSNorm | None, RMSNorm | None],
        num_heads: int,
        layer: LayerInfo,
        index: int,
        current: CurrentStep,
        sizes: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv, self.out = qkv, out
        self.q_norm, self.k_norm = norms
        self.num_heads, self.layer, self.index, self.current = num_heads, layer, index, current
        self._run_qkv, self._run_out = qkv.run, out.run
        self._norms = tuple(None if norm is None else norm.run for norm in norms)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return self.run(hidden_states.reshape(-1, hidden_states.shape[-1])).view(hidden_states.shape), None

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]; stores the step's keys and values."""
        layer = self.layer
        step, cache = self.current.layer(self.index)
        table = self.current.table(layer.rope)
        h, hkv = self.num_heads, layer.num_kv_heads
        qkv = self._run_qkv(x).view(len(x), h + 2 * hkv, layer.head_dim)
        q, k, v = qkv.split((h, hkv, hkv), 1)
        q_norm, k_norm = self._norms
        if q_norm is not None:
            q = q_norm(q)
        if k_norm is not None:
            k = k_norm(k)
        dispatch.store_kv(cache, k, v, step.slots)
        if table is not None:
            q = dispatch.rotate(q, step, table)
        attended = dispatch.attention(q, cache, step, table, layer.spec)  # [T, H, D]
        return self._run_out(self.current.gathered(attended.view(len(x), -1), self.sizes))


class InterfaceAttention(AttentionCall):
    """Behind the attention interface of an untouched module: keys arrive rotated, and are cached so."""

    def __init__(self, layer: LayerInfo, index: int, current: CurrentStep) -> None:
        self.layer, self.index, self.current = layer, index, current

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, **settings: object
    ) -> tuple[Tensor, None]:
        step, cache = self.current.layer(self.index)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, heads, D]
        dispatch.store_kv(cache, k, v, step.slots)
        return dispatch.attention(q, cache, step, None, self.layer.spec).unsqueeze(0), None
