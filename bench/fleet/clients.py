"""The clients of one place, one after the other, in the simulation and before real servers alike."""

from collections.abc import Iterator

from bench.fleet.plan import Plan
from bench.fleet.traces import CROWDS, Source, Turn

MOST_BEGIN_S = 30.0


class Clients:
    """What they do depends on the plan's seed and the place alone."""

    def __init__(self, plan: Plan, place: int) -> None:
        self._plan, self._place, self._number = plan, place, 0
        self._source = Source(f"{plan.seed} {plan.crowd} {place}", plan.scale)
        self.begins_s = self._source.draw.random() * min(plan.warm_s / 2, MOST_BEGIN_S)  # when the first of them comes

    def next(self) -> list[tuple[str, Iterator[Turn]]]:
        """The streams of the next one, each with its session's name, or none."""
        crowd, is_old = CROWDS[self._plan.crowd], self._number == 0 or self._source.draw.random() < 0.5
        streams = crowd.next(self._source.branch(), is_old)
        has_id = crowd.has_sessions and self._plan.sends_ids
        self._number += 1
        return [
            (f"{self._place} {self._number} {number}" if has_id else "", stream)
            for number, stream in enumerate(streams)
        ]

    def rest_s(self) -> float:
        """Until the next one comes."""
        rest_s = CROWDS[self._plan.crowd].rest_s
        return self._source.pause_s(0, rest_s) if rest_s else 0.0
