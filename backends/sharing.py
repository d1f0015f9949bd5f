"""How many threads to compute with beside others: fewer while the machine is busy, all again once processors idle.

Threads of a step wait for each other at each of its operations. Where the system lets one of them wait for a processor,
as others run on it, all wait, hundreds of times a step.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tightrope.backends.threads import usable_cpus

LOOK_EVERY_S = 0.1  # The system counts idle time in hundredths of a second.
WAITING, IDLE = (
    0.5,
    0.6,
)  # threads that wait on average, of which one is too many; idle processors that make room for one
LEAST_ACTIVE = 0.2  # threads that run or wait on average, below which there was too little work to judge by


@dataclass(frozen=True, slots=True)
class Counters:
    """What the system has counted so far, in seconds: of this process' threads together, and of the usable CPUs."""

    running: float
    waiting: float  # they could have run, and others did
    idle: float


@dataclass(frozen=True, slots=True)
class Interval:
    """The same, of an interval of `seconds`."""

    seconds: float
    running: float
    waiting: float
    idle: float


def threads_after(now: int, most: int, seen: Interval) -> int:
    """How many threads to go on with, of 1 to `most`, after an interval with `now` of them."""
    active = seen.running + seen.waiting
    if active >= LEAST_ACTIVE * seen.seconds:
        waiting = now * seen.waiting / active
        if waiting >= WAITING:
            return max(1, now - int(waiting + 1 - WAITING))
    return min(most, now + int(seen.idle / seen.seconds + 1 - IDLE))


class Threads:
    """The number of threads of the steps of one model: `most`, or fewer while others need the machine."""

    def __init__(
        self,
        most: int,
        apply: Callable[[int], None] = lambda count: None,
        read: Callable[[], Counters | None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """apply: is called with each new number, between two steps. read: None where the system doesn't count."""
        self.most = self.now = most
        self._apply, self._read, self._clock = apply, read or read_counters, clock
        self._seen_s = clock()
        self._seen = self._read() if most > 1 else None

    def settle(self) -> int:
        """To be called before each step: how many threads it has."""
        if self._seen is not None and (seconds := self._clock() - self._seen_s) >= LOOK_EVERY_S:
            self._look(self._seen, seconds)
        return self.now

    def _look(self, before: Counters, seconds: float) -> None:
        self._seen = after = self._read()
        self._seen_s += seconds
        if after is None:
            return
        # Threads that have ended take their counts along.
        running, waiting = max(0.0, after.running - before.running), max(0.0, after.waiting - before.waiting)
        interval = Interval(seconds, running, waiting, max(0.0, after.idle - before.idle))
        count = threads_after(self.now, self.most, interval)
        if count != self.now:
            self.now = count
            self._apply(count)


def read_counters() -> Counters | None:
    """See Counters; None where the system has none."""
    running = waiting = 0
    try:
        for task in os.scandir("/proc/self/task"):
            try:
                ran_ns, waited_ns, _ = Path(task.path, "schedstat").read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # It has just ended.
            running, waiting = running + int(ran_ns), waiting + int(waited_ns)
        if not running:
            return None  # The file is there, and the kernel was built without what fills it.
        names = {f"cpu{number}" for number in usable_cpus()}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        ticks = sum(int(row[4]) + int(row[5]) for row in rows if row[0] in names)  # idle, and waiting for a disk
        return Counters(running / 1e9, waiting / 1e9, ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None
