"""A run of the untouched skeleton on a few tokens, with random stand-ins for its weights, to see what it computes.

A class name or an attribute says little about what a module does with its input: whether keys are rotated in halves or
interleaved, whether a norm adds one to its weight, which window a layer has. So the skeleton runs once, and everything
that goes into and comes out of its modules is written down. Our module takes the place of one only if it gives the
same (patterns.py). Costs a megabyte and some milliseconds a layer, also of a large model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.modules.interface import AttentionCall, answer_with

TOKENS = 2
FAR, NEAR = 1_000_003, 5  # First positions aren't zero, where every rotation is the identity.
TABLE_ROWS = 16  # An embedding's stand-in has more rows than there are tokens and positions.


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module. Arguments are of transformers' many kinds."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def hidden_states(self) -> Tensor:
        """What the module worked on: its first argument, or the one of that name."""
        value = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True, slots=True)
class Attended:
    """What one attention module handed to the attention interface, and the answer it got.

    query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv], output [1, T, H, Dv].
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: object
    settings: Mapping[str, object]
    output: Tensor


@dataclass(slots=True)
class Trace:
    """Everything that was written down: each module's last call, and the calls of attention in layer order."""

    calls: dict[nn.Module, Call] = field(default_factory=dict)
    attended: list[Attended] = field(default_factory=list)
    parameters: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)  # Stand-ins for weights.


def trace_model(model: PreTrainedModel) -> Trace:
    """Run the skeleton and leave it as it was. Raises BackendError when it can't run as a causal language model."""
    try:
        try:
            return _trace_at(FAR, model)  # Queries that are scaled by position show it there.
        except (IndexError, RuntimeError):  # Positions are looked up in a table.
            return _trace_at(NEAR, model)
    except Exception as error:  # The model's own code may raise any kind.
        reason = " ".join(str(error).split())[:200]
        kind = model.config.model_type
        raise BackendError(f"config.json: a model of model_type {kind!r} can't run here: {reason}") from error


def _trace_at(first: int, model: PreTrainedModel) -> Trace:
    seen = Trace()
    random = torch.Generator().manual_seed(1)
    ids = torch.arange(1, TOKENS + 1).unsqueeze(0)
    positions = torch.arange(first, first + TOKENS).unsqueeze(0)
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            stack.callback(_stand_in(module, random, seen))
            stack.callback(module.register_forward_hook(_write_down(seen), with_kwargs=True).remove)
            stack.callback(answer_with(module, _Recorder(module, random, seen)))
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return seen


def _stand_in(module: nn.Module, random: torch.Generator, seen: Trace) -> Callable[[], None]:
    """Give a module random values for its weights, and return what takes them away again.

    Linears and experts, the bulk of a model, answer out of the air instead; embeddings get a small table.
    """
    weights = {name: weight for name, weight in module._parameters.items() if weight is not None}
    if is_linear(module) or any(weight.dim() == 3 for weight in weights.values()):
        module.__dict__["forward"] = _linear(module, random) if is_linear(module) else _as_given
        return lambda: module.__dict__.pop("forward")
    rows = TABLE_ROWS if isinstance(module, nn.Embedding) else None
    seen.parameters[module] = values = {
        name: torch.rand(rows or len(weight), *weight.shape[1:], generator=random) + 0.5
        for name, weight in weights.items()
    }
    module._parameters.update((name, nn.Parameter(value, requires_grad=False)) for name, value in values.items())
    if not isinstance(module, nn.Embedding):
        return lambda: module._parameters.update(weights)
    padding_idx, module.padding_idx = module.padding_idx, None  # It may lie beyond the small table.

    def restore() -> None:
        module._parameters.update(weights)
        module.padding_idx = padding_idx

    return restore


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is torch's linear, with no arithmetic of its own."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _linear(module: nn.Linear, random: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.randn(*x.shape[:-1], module.out_features, generator=random)


def _as_given(hidden_states: Tensor, *routing: Tensor) -> Tensor:
    return hidden_states


def _write_down(seen: Trace) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        seen.calls[module] = Call(args, kwargs, output)

    return hook


class _Recorder(AttentionCall):
    """Answers a module's attention out of the air, and writes down what it asked."""

    def __init__(self, module: nn.Module, random: torch.Generator, seen: Trace) -> None:
        self.module, self.random, self.seen = module, random, seen

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, **settings: object
    ) -> tuple[Tensor, None]:
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        output = torch.randn(shape, generator=self.random)
        self.seen.attended.append(Attended(self.module, query, key, value, mask, settings, output))
        return output, None
