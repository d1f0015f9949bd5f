"""Fewer threads while others keep the machine busy, all of them once it is quiet."""

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.sharing import (
    FREE,
    LOOK_EVERY_S,
    WAITING,
    Counters,
    Threads,
    read_counters,
    threads_after,
)

pytestmark = pytest.mark.quick

COUNTS = st.integers(1, 64).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))
SECONDS = st.floats(0, 200)


@given(COUNTS, st.floats(0.01, 100), SECONDS, SECONDS, SECONDS, SECONDS)
def test_there_is_one_thread_at_least_and_never_more_than_allowed(
    counts: tuple[int, int], seconds: float, running: float, waiting: float, idle: float, others: float
):
    now, most = counts

    assert 1 <= threads_after(now, most, seconds, Counters(running, waiting, idle, others)) <= most


@given(COUNTS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_more_waiting_never_leads_to_more_threads(
    counts: tuple[int, int], running: float, waiting: float, others: float, more: float
):
    now, most = counts

    less, greater = (
        threads_after(now, most, 1, Counters(running, wait, 0, others)) for wait in (waiting, waiting + more)
    )

    assert greater <= less


@given(COUNTS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_more_idle_processors_never_lead_to_fewer_threads(
    counts: tuple[int, int], running: float, waiting: float, idle: float, more: float
):
    now, most = counts

    less, greater = (threads_after(now, most, 1, Counters(running, waiting, free, 0)) for free in (idle, idle + more))

    assert greater >= less


@given(st.integers(1, 64), st.floats(0.01, 100), SECONDS, st.floats(0, 1), st.data())
def test_threads_that_wait_while_no_other_program_runs_all_stay(
    cpus: int, seconds: float, waiting: float, idle_share: float, data: st.DataObject
):
    threads = data.draw(st.integers(1, cpus))
    idle = idle_share * cpus * seconds
    seen = Counters(cpus * seconds - idle, waiting, idle, 0)  # Other threads of ours, and the server in front, compute.

    assert threads_after(threads, threads, seconds, seen) == threads


@given(st.integers(1, 64), st.floats(0, 0.99 - FREE), st.floats(0, 1), st.data())
def test_all_threads_come_back_and_stay_beside_others_that_do_little(
    cpus: int, others: float, delayed: float, data: st.DataObject
):
    now = data.draw(st.integers(1, cpus))
    waiting = others * delayed
    running = min(now - waiting, cpus - others)

    assert threads_after(now, cpus, 1, Counters(running, waiting, cpus - others - running, others)) == cpus


@pytest.mark.parametrize(
    ("now", "running", "waiting", "wanted"),
    [
        (2, 1.5, 0.1, 2),  # an eighth of a thread waits
        (2, 1.3, 0.7, 1),  # seven tenths of one
        (8, 6.5, 1.5, 6),  # one and a half
        (2, 0.1, 1.9, 1),
        (2, 0.01, 0.05, 2),  # an answer has just begun: too little to judge by
    ],
)
def test_as_many_threads_go_as_wait_on_average_for_others(now: int, running: float, waiting: float, wanted: int):
    assert threads_after(now, 8, 1, Counters(running, waiting, 0, waiting)) == wanted


@pytest.mark.parametrize(
    ("others", "wanted"), [(4, 1), (3, 1), (2.5, 1), (2.3, 2), (1.4, 3), (1.3, 3), (0.3, 4), (0, 4)]
)
@pytest.mark.parametrize("idle_share", [0, 0.5, 1])
def test_as_many_threads_come_as_processors_are_free_of_others(others: float, wanted: int, idle_share: float):
    free = 4 - others  # Our one thread, other threads of ours and the server in front run there, or nothing.

    assert threads_after(1, 4, 1, Counters(free * (1 - idle_share), 0, free * idle_share, others)) == wanted


STEP_S = 2 * LOOK_EVERY_S


@dataclass
class Machine:
    """So many CPUs, shared fairly by our threads and by others that never rest."""

    cpus: int
    busy: int = 0
    now_s: float = 0.0
    counted: Counters = field(default_factory=lambda: Counters(0, 0, 0, 0))

    def read(self) -> Counters:
        return self.counted

    def waiting(self, threads: int) -> float:
        """Threads that wait on average."""
        return threads * (1 - min(1, self.cpus / (threads + self.busy)))

    def work(self, threads: int) -> None:
        """A step that is longer than the time between two looks."""
        waiting, before = self.waiting(threads), self.counted
        idle = max(0, self.cpus - self.busy - threads)
        running = threads - waiting
        self.now_s += STEP_S
        self.counted = Counters(
            before.running + running * STEP_S,
            before.waiting + waiting * STEP_S,
            before.idle + idle * STEP_S,
            before.others + (self.cpus - running - idle) * STEP_S,
        )


@given(st.integers(1, 32), st.integers(0, 40), st.integers(1, 32))
def test_threads_leave_others_their_processors_and_come_back_when_these_are_gone(cpus: int, busy: int, most: int):
    machine, applied = Machine(cpus, busy), [most]
    threads = Threads(most, applied.append, machine.read, lambda: machine.now_s)

    for _ in range(20):
        machine.work(threads.settle())
    assert threads.now == 1 or machine.waiting(threads.now) <= 1.01 * WAITING
    assert threads.now >= min(most, cpus - busy)
    machine.busy = 0
    for _ in range(20):
        machine.work(threads.settle())

    assert threads.now == min(most, cpus) == applied[-1]


def test_nothing_is_looked_at_between_two_looks():
    machine = Machine(2)
    threads = Threads(2, read=machine.read, clock=lambda: machine.now_s)
    machine.counted = Counters(0, 10, 0, 10)

    machine.now_s = LOOK_EVERY_S / 2
    assert threads.settle() == 2
    machine.now_s = LOOK_EVERY_S
    assert threads.settle() == 1


@pytest.mark.parametrize("most", [1, 2])
def test_the_number_stays_where_nothing_is_counted(most: int):
    machine = Machine(2)
    threads = Threads(most, read=lambda: None, clock=lambda: machine.now_s)
    machine.now_s = 10.0

    assert threads.settle() == most


def test_the_system_counts_what_this_process_computes():
    before = read_counters()
    if before is None:
        pytest.fail("this system's kernel was built without the counters")
    began_s = time.thread_time()
    while time.thread_time() - began_s < 0.05:
        pass

    after = read_counters()

    assert after is not None
    assert after.running - before.running >= 0.04
    assert after.waiting >= before.waiting
    assert after.idle >= before.idle
