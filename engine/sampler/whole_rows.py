"""What steps come to that run over a whole row: one function a step, from what was summed over the row to a transform.

kernels.reference.row_sums says what each kind of transform does.
"""

import math
from collections.abc import Mapping

import numpy as np

from tightrope.engine.sampler.mirostat import cuts
from tightrope.engine.sampler.reshaping import LEAST, MOST, dynamic
from tightrope.engine.sampler.state import SamplerState
from tightrope.kernels.forms.rows import CUT, DIVIDE, PARABOLA

Transform = tuple[float, float, float, float]  # A kind stands before its numbers.
Sums = Mapping[str, float]  # The names are those of kernels.forms.rows.SUMS; a step that measures nothing gets none.

_NONE: Transform = (0.0, 0.0, 0.0, 0.0)


def temperature(state: SamplerState, sums: Sums) -> Transform:
    params = state.params
    t = params.temperature
    if params.dynatemp_range > 0:
        share = _entropy(sums) / math.log(max(sums["count"], 2))
        t = float(dynamic(*(np.array(x) for x in (t, params.dynatemp_range, params.dynatemp_exponent, share))))
    return DIVIDE, min(max(t, LEAST), MOST), 0.0, 0.0


def smoothing(state: SamplerState, sums: Sums) -> Transform:
    return PARABOLA, state.params.smoothing_factor, state.params.smoothing_curve, 0.0


def top_n_sigma(state: SamplerState, sums: Sums) -> Transform:
    mean = sums["first"] / sums["count"]
    variance = sums["second"] / sums["count"] - mean * mean
    return CUT, -state.params.top_n_sigma * math.sqrt(max(variance, 0.0)), 0.0, 0.0


def eta_cutoff(state: SamplerState, sums: Sums) -> Transform:
    epsilon = math.log(state.params.eta_cutoff)
    return _cut(min(epsilon, epsilon / 2 - _entropy(sums)) + math.log(sums["mass"]))


def mirostat_2(state: SamplerState, sums: Sums) -> Transform:
    return _cut(math.log(sums["mass"]) - state.mu * math.log(2)) if cuts(state.mu, state.vocab_size) else _NONE


def _cut(y: float) -> Transform:
    return CUT, min(y, 0.0), 0.0, 0.0


def _entropy(sums: Sums) -> float:
    """In nats."""
    return math.log(sums["mass"]) - sums["moment"] / sums["mass"]
