"""What steps need on each device behind the first, where a model's layers lie on several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tightrope.backends.hf.modules.step import StepOn
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows


@dataclass(frozen=True, slots=True)
class StageInputs:
    """Rotary tables and scratch of one device; those of a step are made of a step's numbers on the CPU."""

    device: torch.device
    rotary: Mapping[str, RotarySets]
    scratch: Tensor | None = None  # See StepLayout.

    @classmethod
    def of(cls, rope: Mapping[str, RopeSpec], window: int, device: torch.device) -> "StageInputs":
        """Those for sequences of up to `window` tokens, without scratch."""
        return cls(device, {name: RotarySets(spec, window, device) for name, spec in rope.items()})

    def tables(self, lengths: Sequence[int]) -> dict[str, RopeTable]:
        """By what each kind of layer rotates sequences that compute with the frequencies of these lengths [B]."""
        return {name: rotary.table(lengths) for name, rotary in self.rotary.items()}

    def step(self, layout: StepLayout, lengths: Sequence[int], adapters: AdapterRows | None) -> StepOn:
        """A step as this device has it."""
        layout = layout.to(self.device)
        if self.scratch is not None:
            layout = replace(layout, scratch=self.scratch)
        return StepOn(layout, self.tables(lengths), None if adapters is None else adapters.to(self.device))
