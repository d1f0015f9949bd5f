"""The first steps of a row, where they change or remove logits by their size alone: see Plan.head.

Such steps keep the order of the logits, so a row is ranked as it is and the steps are applied to its list; where they
need to know of the whole row (its entropy, its deviation, its mass), one pass over it sums that. Nothing is written: a
whole row is transformed only on its way through the registers. kernels.reference.row_sums says what each transform is.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from tightrope.engine.sampler.arrays import Doubles, Ids
from tightrope.engine.sampler.reshaping import quadratic
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import STEPS, WholeRow, function
from tightrope.engine.sampler.whole_rows import Sums, Transform
from tightrope.kernels import dispatch
from tightrope.kernels.forms.rows import CUT, DIVIDE, MAX_TRANSFORMS, PARABOLA, SUMS

_WHOLE_ROWS: Mapping[str, tuple[WholeRow, Callable[[SamplerState, Sums], Transform]]] = {
    step.name: (step.whole_row, function(step.whole_row.run)) for step in STEPS if step.whole_row is not None
}


def transforms_of(logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> Doubles:
    """What the first steps of these rows [B] of logits [any, V] float32 come to: [B, MAX_TRANSFORMS, 4]."""
    transforms = np.zeros((len(rows), MAX_TRANSFORMS, 4))
    if any(state.plan.head for state in states):
        with np.errstate(all="ignore"):  # Rows from which nothing can be drawn are full of NaN.
            _fill(transforms, logits, rows, states)
    return transforms


def _fill(transforms: Doubles, logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> None:
    for place in range(max((len(state.plan.head) for state in states), default=0)):
        steps = {
            line: _WHOLE_ROWS[state.plan.head[place]]
            for line, state in enumerate(states)
            if place < len(state.plan.head)
        }
        measured = [line for line, (way, _) in steps.items() if way.measures(states[line].params)]
        sums: dict[int, Sums] = {}
        if measured:
            found = dispatch.row_sums(logits, rows[measured], transforms[measured]).tolist()
            sums = {line: dict(zip(SUMS, row, strict=True)) for line, row in zip(measured, found, strict=True)}
        for line, (_, run) in steps.items():
            transforms[line, place] = run(states[line], sums.get(line, {}))


def transformed(y: Doubles, transforms: Doubles) -> Doubles:
    """Logits y [B, N], as distances below the largest of their rows, after the transforms [B, MAX_TRANSFORMS, 4]."""
    for place in range(MAX_TRANSFORMS):
        kinds, a, b, _ = (column[:, None] for column in transforms[:, place].T)
        if not kinds.any():
            break
        if (kinds == DIVIDE).any():
            y = np.where(kinds == DIVIDE, y / a, y)
        if (kinds == PARABOLA).any():
            y = np.where((kinds == PARABOLA) & (y > -np.inf), quadratic(y, a, b), y)
        y = np.where((kinds == CUT) & (y < a), -np.inf, y)
    return y
