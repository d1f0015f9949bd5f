"""The first steps of a row, where they change or remove logits by their size alone: see Plan.head.

Such steps keep the order of the logits, so a row is ranked as it is and the steps are applied to its list; where they
need to know of the whole row (its entropy, its deviation, its mass), one pass over it sums that. Nothing is written: a
whole row is transformed only on its way through the registers. kernels.reference.row_sums says what each transform is.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from tightrope.engine.sampler.arrays import Doubles, Ids
from tightrope.engine.sampler.mirostat import cuts
from tightrope.engine.sampler.reshaping import LEAST, MOST, dynamic, quadratic
from tightrope.engine.sampler.state import SamplerState
from tightrope.kernels import dispatch
from tightrope.kernels.forms.rows import CUT, DIVIDE, MAX_TRANSFORMS, PARABOLA, SUMS

Transform = tuple[float, float, float, float]  # kind and its numbers
Sums = Mapping[str, float]

NONE: Transform = (0.0, 0.0, 0.0, 0.0)


def transforms_of(logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> Doubles:
    """What the first steps of these rows [B] of logits [any, V] float32 come to: [B, MAX_TRANSFORMS, 4]."""
    transforms = np.zeros((len(rows), MAX_TRANSFORMS, 4))
    with np.errstate(all="ignore"):  # rows from which nothing can be drawn are full of NaN
        _fill(transforms, logits, rows, states)
    return transforms


def _fill(transforms: Doubles, logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> None:
    for place in range(max((len(state.plan.head) for state in states), default=0)):
        members = [line for line, state in enumerate(states) if place < len(state.plan.head)]
        measured = [line for line in members if _is_measured(states[line], states[line].plan.head[place])]
        sums: dict[int, Sums] = {}
        if measured:
            found = dispatch.row_sums(logits, rows[measured], transforms[measured]).tolist()
            sums = {line: dict(zip(SUMS, row, strict=True)) for line, row in zip(measured, found, strict=True)}
        for line in members:
            transforms[line, place] = _TRANSFORMS[states[line].plan.head[place]](states[line], sums.get(line, {}))


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


def _is_measured(state: SamplerState, step: str) -> bool:
    """Whether a step must know of the whole row."""
    return step not in ("temperature", "smoothing") or (step == "temperature" and state.params.dynatemp_range > 0)


def _temperature(state: SamplerState, sums: Sums) -> Transform:
    params = state.params
    t = params.temperature
    if params.dynatemp_range > 0:
        share = _entropy(sums) / math.log(max(sums["count"], 2))
        t = float(dynamic(*(np.array(x) for x in (t, params.dynatemp_range, params.dynatemp_exponent, share))))
    return DIVIDE, min(max(t, LEAST), MOST), 0.0, 0.0


def _smoothing(state: SamplerState, sums: Sums) -> Transform:
    return PARABOLA, state.params.smoothing_factor, state.params.smoothing_curve, 0.0


def _top_n_sigma(state: SamplerState, sums: Sums) -> Transform:
    mean = sums["first"] / sums["count"]
    variance = sums["second"] / sums["count"] - mean * mean
    return CUT, -state.params.top_n_sigma * math.sqrt(max(variance, 0.0)), 0.0, 0.0


def _eta_cutoff(state: SamplerState, sums: Sums) -> Transform:
    epsilon = math.log(state.params.eta_cutoff)
    return _cut(min(epsilon, epsilon / 2 - _entropy(sums)) + math.log(sums["mass"]))


def _mirostat_2(state: SamplerState, sums: Sums) -> Transform:
    return _cut(math.log(sums["mass"]) - state.aim * math.log(2)) if cuts(state.aim, state.vocab_size) else NONE


def _cut(y: float) -> Transform:
    return CUT, min(y, 0.0), 0.0, 0.0


def _entropy(sums: Sums) -> float:
    """In nats."""
    return math.log(sums["mass"]) - sums["moment"] / sums["mass"]


_TRANSFORMS: Mapping[str, Callable[[SamplerState, Sums], Transform]] = {
    "temperature": _temperature,
    "smoothing": _smoothing,
    "top_n_sigma": _top_n_sigma,
    "eta_cutoff": _eta_cutoff,
    "mirostat": _mirostat_2,
}
