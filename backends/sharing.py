"""How many threads to compute with beside others: fewer while other programs keep the machine busy, all again after.

Threads of a step wait for each other at each of its operations. Where the system lets one of them wait for a processor,
as others run on it, all wait, hundreds of times a step. Our own threads and the server in front of them get in each
other's way as well, for moments; that is no reason to compute with fewer.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from tightrope.backends.threads import usable_cpus

LOOK_EVERY_S = 0.1  # The system counts idle time in hundredths of a second.
WAITING = 0.5  # threads that wait on average, of which one is too many
FREE = 0.6  # of a processor without others: room for a thread more
LEAST_ACTIVE = 0.2  # threads that run or wait on average, below which there was too little work to judge by


@dataclass(frozen=True, slots=True)
class Counters:
    """What the system has counted so far, in seconds."""

    running: float  # this process' threads together and its parent, the server
    waiting: float  # this process' threads together: they could have run, and others did, or threads of our own
    idle: float  # the CPUs that we may use, together
    others: float  # All else that runs there. The count begins anywhere, and grows.

    def since(self, before: "Counters") -> "Counters":
        """What was counted between the two; threads that have ended take their waiting along."""
        return Counters(
            max(0.0, self.running - before.running),
            max(0.0, self.waiting - before.waiting),
            max(0.0, self.idle - before.idle),
            max(0.0, self.others - before.others),
        )


def threads_after(now: int, most: int, seconds: float, seen: Counters) -> int:
    """How many threads to go on with, of 1 to `most`, after an interval with `now` of them."""
    free = seen.running + seen.idle
    # Threads wait for others no longer than these ran; with more threads than processors they wait for each other.
    waiting = min(seen.waiting, max(seen.others, now * seconds - free))
    active = seen.running + waiting
    if active >= LEAST_ACTIVE * seconds and (mean := now * waiting / active) >= WAITING:
        return max(1, now - int(mean + 1 - WAITING))
    return min(most, max(now, int(free / seconds + 1 - FREE)))


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
        count = threads_after(self.now, self.most, seconds, after.since(before))
        if count != self.now:
            self.now = count
            self._apply(count)


def read_counters() -> Counters | None:
    """See Counters; None where the system has none."""
    try:
        ran, waited = zip(*map(_times_ns, os.listdir("/proc/self/task")), strict=True)
        if not any(ran):
            return None  # The files are there, and the kernel was built without what fills them.
        cpus = usable_cpus()
        names = {b"cpu%d" % number for number in cpus}
        with open("/proc/stat", "rb") as file:  # Its first lines are those of the CPUs.
            rows = [line.split() for line in takewhile(lambda line: line.startswith(b"cpu"), file)]
        counted = [[int(ticks) for ticks in row[1:]] for row in rows if row[0] in names]
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        idle = sum(row[3] + row[4] for row in counted) / ticks_per_s  # idle, and waiting for a disk
        stolen = sum(row[7] for row in counted) / ticks_per_s  # by the host of a virtual machine
        running = time.process_time() + _parent_s()
        others = len(cpus) * time.perf_counter() - idle - stolen - running
        return Counters(running, sum(waited) / 1e9, idle, others)
    except (OSError, ValueError, IndexError):
        return None


def _times_ns(thread: str) -> tuple[int, int]:
    """How long one of our threads has run, and waited for a processor; nothing of one that has just ended."""
    try:
        file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
        try:
            ran, waited, _ = os.read(file, 128).split()
        finally:
            os.close(file)
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(ran), int(waited)


def _parent_s() -> float:
    """CPU seconds of the process that has started this one; 0 for one outside a container."""
    parent = os.getppid()
    try:
        return time.clock_gettime((~parent << 3) | 2) if parent else 0.0  # clock_getcpuclockid(3), which Python lacks
    except OSError:
        return 0.0  # It has just ended.
