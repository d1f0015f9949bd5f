"""How long a newcomer would wait, by what answers have taken lately and by how long others wait."""

import math
from collections import deque

from tightrope.engine.types import Finish

LONGEST_S = 3600


def back_in_s(load_s: float, taken_s: float) -> int:
    """Whole seconds until an engine takes requests, at least 1, of which the last took `load_s` to load (0: none has).

    taken_s: since this one was started. What takes longer than it should may take as long again as it has.
    """
    rest_s = load_s - taken_s
    return max(1, math.ceil(rest_s if rest_s > 0 else taken_s))


class QueueTimes:
    """Learns from answers that have finished."""

    def __init__(self) -> None:
        self._service_s: deque[float] = deque(maxlen=32)

    def observe(self, finish: Finish) -> None:
        """Take in how long an answer held its place."""
        self._service_s.append(finish.timings.prefill_s + finish.timings.decode_s)

    def wait_s(self, num_waiting: int, num_places: int, oldest_s: float) -> int:
        """Whole seconds until one who comes now would get a place, at least 1.

        Of `num_places` places each becomes free once in the mean time of an answer. oldest_s: how long the one that has
        waited for longest has waited; nobody behind it will be served sooner.
        """
        mean_s = sum(self._service_s) / len(self._service_s) if self._service_s else 0.0
        return min(LONGEST_S, max(1, math.ceil(max(oldest_s, mean_s * (num_waiting + 1) / num_places))))
