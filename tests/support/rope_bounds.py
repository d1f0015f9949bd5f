"""How far rotary frequencies that float32 arithmetic makes may be from those of a RopeSpec, which float64 makes.

transformers makes them of float32 numbers, by the formulas of its modeling_rope_utils. Both sides round the exponents
alike; every other step of those formulas is counted here, each with the rounding that IEEE 754 gives it, or the one
unit in the last place, two UNIT, that vectorised powers may be off by.
"""

import math

import numpy as np
from error_bounds import UNIT
from numpy.typing import NDArray

from tightrope.backends.rope.scaling import RopeSpec

Doubles = NDArray[np.float64]

FACTOR = 16 * 2.0**-53  # relative, of an attention factor: a few operations of float64 each way


def frequencies_off(spec: RopeSpec, length: int) -> Doubles:
    """[rotary_dim / 2] radians a token, for a sequence of `length` tokens."""
    exponents = np.arange(0, spec.rotary_dim, 2) / spec.rotary_dim
    # the rounded base, the power, its reciprocal, and RopeSpec's own rounding
    relative = exponents * _base_off(spec, length) + 4 * UNIT
    found = spec.frequencies(length)[0].astype(np.float64)
    if spec.kind not in ("yarn", "llama3"):
        return found * (relative + 3 * UNIT)  # a factor, a product or quotient by it, and one more in longrope
    plain = spec.theta**-exponents
    # both ends of a mixture: the factor and the quotient by it; then two products and a sum
    ramp_off = _yarn_ramp_off(spec) if spec.kind == "yarn" else _llama3_ramp_off(spec, plain, relative)
    mixed: Doubles = found * (relative + 5 * UNIT) + plain * abs(1 - 1 / spec.factor) * ramp_off
    return mixed


def _base_off(spec: RopeSpec, length: int) -> float:
    """Relative. A dynamic base has its stretch, factor * length / begin - (factor - 1), to a power near 1."""
    begin = spec.dynamic_len or spec.trained_len
    if spec.kind != "dynamic" or length <= begin:
        return UNIT
    reached, power = spec.factor * length / begin, spec.rotary_dim / (spec.rotary_dim - 2)
    stretch = reached - (spec.factor - 1)
    # the factor, the product and the quotient; the factor less one; the difference
    stretch_off = UNIT * (3 * reached + spec.factor - 1 + stretch) / stretch
    # the rounded exponent, the power, the base and their product
    return power * stretch_off + UNIT * (power * math.log(stretch) + 4)


def _yarn_ramp_off(spec: RopeSpec) -> Doubles:
    """Absolute, of (pair - low) / (high - low) held between 0 and 1, where both were rounded."""

    def pair_of(turns: float) -> float:
        return spec.rotary_dim * math.log(spec.trained_len / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_of(spec.beta_fast), pair_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low if high != low else 0.001
    low_off = abs(low - float(np.float32(low)))
    # the difference, the width, the quotient, and two differences from 1: of what lies within the ramp
    return np.full(spec.rotary_dim // 2, low_off / abs(width) + 5 * UNIT)


def _llama3_ramp_off(spec: RopeSpec, plain: Doubles, relative: Doubles) -> Doubles:
    """Absolute, of (turns - low) / (high - low) held between 0 and 1, where turns = window / (2 pi / frequency)."""
    low, high = spec.low_freq_factor, spec.high_freq_factor
    turns = np.clip(spec.trained_len * plain / (2 * math.pi), low, high)
    # pi and two quotients; the lower end; then as in YaRN's
    off: Doubles = (turns * (relative + 3 * UNIT) + low * UNIT) / (high - low) + 5 * UNIT
    return off
