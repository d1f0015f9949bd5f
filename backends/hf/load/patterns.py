"""What a module of the skeleton computes, read off its trace: each function describes a shape we know, or None.

Equal means equal to float32 rounding on the trace's random values; a chance match is out of the question.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightrope.backends.hf.load.trace import Attended, Call, Trace, is_linear
from tightrope.backends.hf.modules.interface import Mask
from tightrope.kernels import reference
from tightrope.kernels.forms.layout import AttentionSpec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_NOTHING = nn.Module()  # It stands for a child that is not there.
PROBE = 1 << 24  # A mask is asked at this position, far beyond every window.


def is_same(x: object, y: Tensor) -> bool:
    """Whether two tensors are equal to float32 rounding."""
    return isinstance(x, Tensor) and x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm over the last dimension."""

    size: int
    eps: float
    offset: float  # It is added to the weight of the file: Gemma's is 1.


def norm(module: nn.Module, seen: Trace) -> Norm | None:
    call, weights = seen.calls.get(module), seen.parameters.get(module, {})
    eps = next((value for name, value in vars(module).items() if name in ("eps", "variance_epsilon")), None)
    if call is None or set(weights) != {"weight"} or weights["weight"].dim() != 1 or not isinstance(eps, float):
        return None
    weight, x = weights["weight"], call.hidden_states
    for offset in (0.0, 1.0):
        if x.shape[-1] == len(weight) and is_same(call.output, reference.rms_norm(x.float(), weight + offset, eps)):
            return Norm(len(weight), eps, offset)
    return None


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated MLP: down(activation(gate) * up), its children by name."""

    gate_up: tuple[nn.Linear, ...]  # One fused, or gate and up.
    down: nn.Linear
    activation: str


def gated(module: nn.Module, seen: Trace) -> Gated | None:
    children, call = dict(module.named_children()), seen.calls.get(module)
    first = _linears(children, ("gate_up_proj",)) or _linears(children, ("gate_proj", "up_proj"))
    down = _linears(children, ("down_proj",))
    if call is None or not first or not down or not _all_called(seen, (*first, *down)):
        return None
    gate_up = torch.cat([seen.calls[linear].output for linear in first], -1)
    if seen.calls[down[0]].output is not call.output or not _all_given(seen, first, call.hidden_states):
        return None
    for activation in ACTIVATIONS:
        if is_same(seen.calls[down[0]].hidden_states, reference.gated(gate_up, activation)):
            return Gated(first, down[0], activation)
    return None


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts of a mixture, fused: gate_up_proj [E, 2 * F, K] and down_proj [E, K, F]."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str


def experts(module: nn.Module) -> Mixture | None:
    """Tried on small weights of the same layout, since those of the model were too large to make up."""
    weights = dict(module.named_parameters(recurse=False))
    if set(weights) != {"gate_up_proj", "down_proj"} or any(weight.dim() != 3 for weight in weights.values()):
        return None
    num_experts, hidden_size, intermediate_size = weights["down_proj"].shape
    if weights["gate_up_proj"].shape != (num_experts, 2 * intermediate_size, hidden_size):
        return None
    random = torch.Generator().manual_seed(1)
    gate_up, down = torch.randn(num_experts, 6, 5, generator=random), torch.randn(num_experts, 5, 3, generator=random)
    x, picked = torch.randn(2, 5, generator=random), torch.tensor([[0, num_experts - 1]] * 2)
    shares = torch.rand(2, 2, generator=random)
    module._parameters.update(gate_up_proj=nn.Parameter(gate_up, False), down_proj=nn.Parameter(down, False))
    try:
        output = module(x, picked, shares)
    except Exception:  # With another calling convention or layout it keeps its class.
        return None
    finally:
        module._parameters.update((name, nn.Parameter(weight, False)) for name, weight in weights.items())
    for activation in ACTIVATIONS:
        parts = [
            shares[:, i : i + 1] * F.linear(reference.gated(F.linear(x, gate_up[e]), activation), down[e])
            for i, e in enumerate(picked[0])
        ]
        if is_same(output, parts[0] + parts[1]):
            return Mixture(num_experts, hidden_size, intermediate_size, activation)
    return None


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention with linears for queries, keys and values, perhaps a norm of each head, and half-split rotation."""

    qkv: tuple[nn.Linear, ...]  # One fused, or three.
    out: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    is_rotated: bool


def heads(asked: Attended, seen: Trace) -> Heads | None:
    children, call = dict(asked.module.named_children()), seen.calls.get(asked.module)
    qkv = _linears(children, ("qkv_proj",)) or _linears(children, ("q_proj", "k_proj", "v_proj"))
    out = _linears(children, ("o_proj",))
    if call is None or not qkv or not out or not _all_called(seen, (*qkv, *out)):
        return None
    if not _all_given(seen, qkv, call.hidden_states) or call.output[0] is not seen.calls[out[0]].output:
        return None
    if not is_same(seen.calls[out[0]].hidden_states, asked.output.flatten(2)):
        return None
    widths = [asked.query.shape[1], asked.key.shape[1], asked.value.shape[1]]
    fused = torch.cat([seen.calls[linear].output for linear in qkv], -1)  # [1, T, (H + 2 * Hkv) * D]
    if fused.shape[-1] != sum(widths) * asked.query.shape[3]:
        return None
    q, k, v = fused.unflatten(-1, (sum(widths), -1)).transpose(1, 2).split(widths, 1)
    norms = {name: child for name, child in children.items() if name in ("q_norm", "k_norm")}
    if any(norm(child, seen) is None for child in norms.values()):
        return None
    q, k = (_normed(x, norms.get(name), seen) for x, name in ((q, "q_norm"), (k, "k_norm")))
    if not is_same(asked.value, v):
        return None
    if is_same(asked.query, q) and is_same(asked.key, k):
        return Heads(qkv, out[0], norms.get("q_norm"), norms.get("k_norm"), is_rotated=False)
    angles = rotation(call)
    if angles is None or not (is_same(asked.query, _turn(q, *angles)) and is_same(asked.key, _turn(k, *angles))):
        return None
    return Heads(qkv, out[0], norms.get("q_norm"), norms.get("k_norm"), is_rotated=True)


def _normed(x: Tensor, module: nn.Module | None, seen: Trace) -> Tensor:
    """x [1, heads, T, D] through a norm of the skeleton, which may be of another width."""
    found = None if module is None else norm(module, seen)
    if module is None or found is None or found.size != x.shape[-1]:
        return x
    return reference.rms_norm(x, seen.parameters[module]["weight"] + found.offset, found.eps)


def rotation(call: Call) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [1, T, R] that the model hands to a module."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            return value
    return None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, heads, T, D] with its first R dimensions rotated, dimension i paired with i + R/2."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def window(asked: Attended) -> int | None:
    """How many tokens a token sees, itself included; None is all before it. Asked of the mask, which is what counts.

    Raises ValueError with the reason when the mask is neither causal nor a sliding window.
    """
    if not isinstance(asked.mask, Mask):
        raise ValueError(f"its mask is a {type(asked.mask).__name__} of the model's own making")
    sees = asked.mask.sees
    widths = {_width(sees, query) for query in (PROBE, PROBE + 1)}  # They differ where attention is chunked.
    if len(widths) > 1 or sees(PROBE, PROBE + 1) or not sees(PROBE, PROBE):
        raise ValueError("its attention is neither causal nor a sliding window")
    width = widths.pop()
    return None if width > PROBE else width


def _width(sees: Callable[[int, int], bool], query: int) -> int:
    """How many tokens up to `query` it sees, by bisection: PROBE + 1 when all that were asked about."""
    low, high = 1, PROBE + 1
    while low < high:
        middle = (low + high + 1) // 2
        if sees(query, query - middle + 1):
            low = middle
        else:
            high = middle - 1
    return low


def scores(asked: Attended) -> AttentionSpec:
    """Scale, softcap and window of a layer. Raises ValueError with the reason when attention does more than these."""
    head_dim = asked.key.shape[3]
    if asked.value.shape[3] != head_dim:
        raise ValueError(f"its keys are {head_dim} wide and its values {asked.value.shape[3]}")
    if unknown := [name for name in ("s_aux", "sinks", "position_bias") if asked.settings.get(name) is not None]:
        raise ValueError(f"its attention takes {unknown[0]}")
    scale, softcap = asked.settings.get("scaling"), asked.settings.get("softcap")
    return AttentionSpec(
        scale=scale if isinstance(scale, float) else head_dim**-0.5,
        window=window(asked),
        softcap=softcap if isinstance(softcap, float) else None,
    )


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder layer: x + post_attention(attention(input(x))), then the same with the MLP. Norms may be missing."""

    attention: nn.Module
    mlp: nn.Module
    input_norm: nn.Module | None
    post_attention_norm: nn.Module | None
    pre_mlp_norm: nn.Module | None
    post_mlp_norm: nn.Module | None


def block(module: nn.Module, seen: Trace) -> Block | None:
    call, children = seen.calls.get(module), dict(module.named_children())
    attention, mlp = children.get("self_attn"), children.get("mlp")
    if call is None or attention is None or mlp is None or not _all_called(seen, (attention, mlp)):
        return None
    x, attended, mixed = call.hidden_states, seen.calls[attention].output[0], seen.calls[mlp].output
    norms = [child for child in children.values() if norm(child, seen) is not None]
    before = _norm_between(norms, seen, output=seen.calls[attention].hidden_states)
    after = _norm_between(norms, seen, given=attended)
    middle = x + (attended if after is None else seen.calls[after].output)
    before_mlp = _norm_between(norms, seen, output=seen.calls[mlp].hidden_states)
    after_mlp = _norm_between(norms, seen, given=mixed) if isinstance(mixed, Tensor) else None
    end = middle + (mixed if after_mlp is None else seen.calls[after_mlp].output) if isinstance(mixed, Tensor) else None
    used = [found for found in (before, after, before_mlp, after_mlp) if found is not None]
    has_parts_of_its_own = bool(module._parameters) or bool(module._buffers)
    starts_match = is_same(_given(seen, before or attention), x) and is_same(_given(seen, before_mlp or mlp), middle)
    if end is None or has_parts_of_its_own or not starts_match or not is_same(call.output, end):
        return None
    return Block(attention, mlp, before, after, before_mlp, after_mlp) if len(set(used)) == len(norms) else None


def _norm_between(
    norms: Iterable[nn.Module], seen: Trace, *, given: Tensor | None = None, output: Tensor | None = None
) -> nn.Module | None:
    """The norm that was given one tensor, or that yielded it."""
    for found in norms:
        if (given is not None and _given(seen, found) is given) or (
            output is not None and seen.calls[found].output is output
        ):
            return found
    return None


def _given(seen: Trace, module: nn.Module) -> Tensor:
    return seen.calls[module].hidden_states


@dataclass(frozen=True, slots=True)
class Stack:
    """The base model: embedding, layers one after the other, a last norm."""

    embedding: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module


def stack(module: nn.Module, seen: Trace) -> Stack | None:
    children, call = dict(module.named_children()), seen.calls.get(module)
    table, layers, last = children.get("embed_tokens"), children.get("layers"), children.get("norm")
    if call is None or not isinstance(layers, nn.ModuleList) or table is None or last is None:
        return None
    if not _all_called(seen, (table, last, *layers)):
        return None
    x = seen.calls[table].output
    for layer in layers:
        if _given(seen, layer) is not x:
            return None
        x = seen.calls[layer].output
    others = [child for name, child in children.items() if name not in ("embed_tokens", "layers", "norm")]
    if any(True for child in (*others,) for _ in child.parameters()):
        return None  # It does more than we know.
    is_last = _given(seen, last) is x and call.output.last_hidden_state is seen.calls[last].output
    return Stack(table, tuple(layers), last) if is_last else None


def is_scored_plainly(model: PreTrainedModel, seen: Trace) -> bool:
    """Whether a model's logits are what its head makes of each hidden state of its base model, and nothing else."""
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or not _all_called(seen, (model, base, head)):
        return False
    hidden, logits = seen.calls[base].output.last_hidden_state, seen.calls[head].output
    return is_same(_given(seen, head), hidden) and is_same(seen.calls[model].output.logits, logits)


def embedding_scale(module: nn.Module, seen: Trace) -> float | None:
    """By how much an embedding multiplies its rows; None when it does something else."""
    call, weight = seen.calls.get(module), seen.parameters.get(module, {}).get("weight")
    if not isinstance(module, nn.Embedding) or call is None or weight is None or not call.args:
        return None
    if call.args[0].is_floating_point() or call.args[0].max() >= len(weight):  # It is a table of something else.
        return None
    rows = F.embedding(call.args[0], weight)
    if is_same(call.output, rows):
        return 1.0
    scale = (call.output / rows).median().item()  # It is a float32.
    return scale if is_same(call.output / scale, rows) else None


def _linears(children: dict[str, nn.Module], names: tuple[str, ...]) -> tuple[nn.Linear, ...]:
    """The linears of these names, all with a bias or all without; or none of them."""
    found = tuple(child for name in names if is_linear(child := children.get(name, _NOTHING)))
    return found if len(found) == len(names) and len({linear.bias is None for linear in found}) == 1 else ()


def _all_called(seen: Trace, modules: Iterable[nn.Module]) -> bool:
    return all(module in seen.calls for module in modules)


def _all_given(seen: Trace, modules: Iterable[nn.Module], x: Tensor) -> bool:
    return all(_given(seen, module) is x for module in modules)
