"""The numbers of sampling that clients send, each in an interval: that of its field of SamplingParams."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from msgspec.inspect import FloatType, IntType, type_info

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.steps import SamplingParams

MAX_INT = 2**63 - 1  # The largest integer that crosses the process border.
_LARGEST = 1e300  # It is far beyond what any number here is good for.


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a number must lie."""

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False  # Whether the interval is open there.
    below_high: bool = False
    whole: bool = False

    def holds(self, value: float) -> bool:
        is_low = value < self.low or (self.above_low and value == self.low)
        is_high = value > self.high or (self.below_high and value == self.high)
        return not is_low and not is_high and abs(value) <= _LARGEST and (not self.whole or value == int(value))

    def __str__(self) -> str:
        low = f"{'above' if self.above_low else 'from'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if self.below_high else 'to'} {self.high:g}" if self.high < math.inf else ""
        return f"{low} {high}".strip() or "of a usual size"


@dataclass(frozen=True, slots=True)
class Number:
    """A value of SamplingParams: the names under which clients send it, of which the first that is there counts."""

    target: str
    names: tuple[str, ...]
    interval: Interval  # It is in the unit of clients.
    off: frozenset[float] = frozenset()  # Other values that mean the neutral one.
    unit: float = 1.0  # What clients count in, in the engine's unit.
    part_of: str | None = None  # While that target is neutral, this number means nothing and isn't read.

    def read(self, name: str, value: object) -> float:
        """Raises InvalidRequest unless `value` is a number in the interval."""
        wanted = "an integer" if self.interval.whole else "a number"
        if not is_number(value):
            raise InvalidRequest(f"{name} must be {wanted}, not {shown(value)}", name)
        if not self.interval.holds(value):
            raise InvalidRequest(f"{name} must be {wanted} {self.interval}, not {shown(value)}", name)
        return int(value) if self.interval.whole else value * self.unit


def _of_type(kind: IntType | FloatType) -> Interval:
    is_int = isinstance(kind, IntType)
    low = next((x for x in (kind.gt, kind.ge) if x is not None), -math.inf)
    high = next((x for x in (kind.lt, kind.le) if x is not None), MAX_INT if is_int else math.inf)
    return Interval(low, high, kind.gt is not None, kind.lt is not None, is_int)


INTERVALS: Mapping[str, Interval] = {
    field.name: _of_type(field.type)
    for field in type_info(SamplingParams).fields  # type: ignore[attr-defined]  # the info of a struct has fields
    if isinstance(field.type, IntType | FloatType)
} | {"seed": Interval(0, 2**64, below_high=True, whole=True)}


def number(
    target: str, *names: str, unit: float = 1.0, off: frozenset[float] = frozenset(), part_of: str | None = None
) -> Number:
    """A field of SamplingParams, which clients send under these names, or else its own."""
    interval = INTERVALS[target]
    if unit != 1:
        interval = replace(interval, low=interval.low / unit, high=interval.high / unit)
    return Number(target, names or (target,), interval, off, unit, part_of)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value in a message of one line."""
    text = json.dumps(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= 40 else text[:40] + "..."
