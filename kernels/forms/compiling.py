"""How long kernels are being compiled, so that a step that waits for one is taken for neither slow nor stuck."""

import time
from collections.abc import Callable


class Compiling:
    """The compiles of a process, told by the one thread that runs steps; any thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s: float | None = None
        self._ended_s = 0.0

    def begin(self) -> None:
        self._began_s = self._clock()

    def end(self) -> None:
        """What has begun is done, or has failed; without a begin nothing happens."""
        began_s, self._began_s = self._began_s, None
        if began_s is not None:
            self._ended_s += self._clock() - began_s

    @property
    def is_under_way(self) -> bool:
        return self._began_s is not None

    @property
    def spent_s(self) -> float:
        """Seconds of all compiles that have ended."""
        return self._ended_s


compiling = Compiling()
