"""Which device each module of a model lies on, where its layers are laid out on several, one after the other.

A stage is a run of layers on one device. What comes before the first layer is of the first stage, and what comes behind
the last, a norm and the head, of the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.load.trace import Trace
from tightrope.backends.hf.load.weights import ExpertWeights, LinearWeights, WantedWeights, Weight
from tightrope.backends.hf.modules.carry import Carry
from tightrope.backends.hf.modules.layer import Stack
from tightrope.backends.hf.modules.step import CurrentStep

# Devices in order, and how many layers each takes, by how many there are.
Placement = Sequence[tuple[torch.device, int]]
LayOut = Callable[[int], Placement]


class Stages:
    """The stages of one model, by the names of its modules and tensors; a model on one device has one."""

    def __init__(
        self, model: PreTrainedModel, seen: Trace, currents: Sequence[CurrentStep], counts: Sequence[int]
    ) -> None:
        """currents: one for each stage, with its device. counts: how many layers each has. Raises BackendError."""
        self.currents = tuple(currents)
        self._last = len(currents) - 1
        self.layer_stages = tuple(stage for stage, count in enumerate(counts) for _ in range(count))
        self.layers: tuple[str, ...] = ()  # Their names; not looked for where all are of one stage.
        self._of: dict[str, int] = {}
        if self._last:
            self.layers = _layer_names(model, seen)
            assert len(self.layers) == len(self.layer_stages)
            self._of = dict.fromkeys(_done_before(model, seen, self.layers), 0)
            self._of |= dict(zip(self.layers, self.layer_stages, strict=True))
        self._modules = {module: self.number(name) for name, module in model.named_modules()}

    def number(self, name: str) -> int:
        """That of a module or tensor."""
        parts = name.split(".") if self._last else []
        return next(
            (self._of[mine] for i in range(len(parts), 0, -1) if (mine := ".".join(parts[:i])) in self._of), self._last
        )

    def of(self, name: str) -> CurrentStep:
        """The step as modules of that name have it."""
        return self.currents[self.number(name)]

    def of_module(self, module: nn.Module) -> CurrentStep:
        """The same for a module of transformers."""
        return self.currents[self._modules.get(module, self._last)]

    def share(self, wants: WantedWeights) -> list[WantedWeights]:
        """What each stage wants of the files."""
        shares = [replace(wants, weights=[], linears=[], tables=[], experts=[]) for _ in self.currents]
        for weight in wants.weights:
            shares[self.number(_name(weight))].weights.append(weight)
        for linear in wants.linears:
            shares[self.number(_name(linear))].linears.append(linear)
        for table in wants.tables:
            shares[self.number(_name(table))].tables.append(table)
        for experts in wants.experts:
            shares[self.number(_name(experts))].experts.append(experts)
        return shares

    def connect(self, model: nn.Module) -> None:
        """Have hidden states carried over where a layer is of another stage than the one before it."""
        if not self._last:
            return
        carries = [Carry(current) for current in self.currents]
        stack = next((module for module in model.modules() if isinstance(module, Stack)), None)
        if stack is not None:
            stack.carries = _firsts(self.layer_stages, self._last, carries)
            return
        for name, stage in zip(self.layers, self.layer_stages, strict=True):
            if stage:  # All layers are given what was made before the first.
                carries[stage].before(model.get_submodule(name))


def _firsts(layer_stages: Sequence[int], last: int, carries: Sequence[Carry]) -> dict[int, Carry]:
    """By the number of a layer, or of what follows the last, what brings hidden states there."""
    found: dict[int, Carry] = {}
    before = 0
    for number, stage in enumerate((*layer_stages, last)):
        if stage != before:
            found[number] = carries[stage]
        before = stage
    return found


def _name(wanted: Weight | LinearWeights | ExpertWeights) -> str:
    """The model's own name of the first of its tensors."""
    if isinstance(wanted, Weight):
        return wanted.sources[0][0].name
    return wanted.prefix if isinstance(wanted, ExpertWeights) else wanted.rows[0][0]


def _layer_names(model: PreTrainedModel, seen: Trace) -> tuple[str, ...]:
    """Those of the members of the list in which the modules that attend are, one in each. Raises BackendError."""
    names = {module: name for name, module in model.named_modules()}
    lists = {
        name: module
        for module, name in names.items()
        if isinstance(module, nn.ModuleList) and len(module) == len(seen.attended)
    }
    for name in lists:
        found = [f"{name}.{number}" for number in range(len(seen.attended))]
        if all(names[one.module].startswith(f"{layer}.") for one, layer in zip(seen.attended, found, strict=True)):
            return tuple(found)
    kind = model.config.model_type
    raise BackendError(
        f"config.json: the layers of a model of model_type {kind!r} can't be told apart; give one device"
    )


def _done_before(model: PreTrainedModel, seen: Trace, layers: Sequence[str]) -> list[str]:
    """Names of modules that had done their work when the first layer began."""
    names = {module: name for name, module in model.named_modules()}
    done: list[str] = []
    for module in seen.calls:  # They stand in the order in which they ended first.
        if names[module].startswith(tuple(f"{layer}." for layer in layers)):
            break
        done.append(names[module])
    return done
