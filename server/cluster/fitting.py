"""Whether this machine holds as many replicas as are asked for; told before Ray starts."""

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tightrope.backends.memory import GIB, MEMORY_SHARE, free_memory
from tightrope.engine.errors import BackendFailed
from tightrope.engine.process.planning import Planned
from tightrope.engine.process.planning import plan as ask_planner
from tightrope.engine.settings import EngineSettings
from tightrope.server.models.room import ENGINE_BYTES, Plan
from tightrope.server.settings.settings import ClusterSettings, ServerSettings

# Seen with ray 2.60: what a replica's own process takes beside its engine's, and all of Ray's with Serve's.
REPLICA_BYTES, RAY_BYTES = 160 << 20, 640 << 20
REPLICA_THREADS, RAY_THREADS = 64, 256  # Those of its engine are counted with a replica's.
ANY_NUMBER = 1 << 30


def within(settings: EngineSettings, memory_bytes: int) -> EngineSettings:
    """The same for an engine whose replica has a share of the memory that is free before any of them loads."""
    most_mib = max(1, int(memory_bytes * MEMORY_SHARE) >> 20)
    if settings.model.max_memory_mib is not None:
        most_mib = min(most_mib, settings.model.max_memory_mib)
    model = settings.model.model_copy(update={"max_memory_mib": most_mib})
    return settings.model_copy(update={"model": model})


class NotHeld(Exception):
    """There is no room for the replicas, or nothing to be served; the message is one line."""


def most_replicas(cluster: ClusterSettings) -> int:
    """So many there may be at a time."""
    return max(cluster.replicas, cluster.max_replicas or 0)


def threads_left() -> int:
    """How many threads may be started beside those that there are: what the system, the user and the group leave."""
    system, left = Path("/proc/sys/kernel"), [ANY_NUMBER]
    with suppress(OSError, ValueError, IndexError):  # This is not Linux.
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        left += [int((system / name).read_text()) - running for name in ("threads-max", "pid_max")]
    for group in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")):  # These are versions 2 and 1.
        with suppress(OSError, ValueError):  # There is no such control group, or no limit in it ("max").
            left.append(int((group / "pids.max").read_text()) - int((group / "pids.current").read_text()))
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if most != resource.RLIM_INFINITY and os.geteuid():  # It does not hold the superuser.
        left.append(most - _threads_of(os.geteuid()))
    return max(0, min(left))


def _threads_of(user: int) -> int:
    found = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, KeyError, ValueError):  # The process has ended.
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            found += int(fields["Threads"]) if int(fields["Uid"].split()[1]) == user else 0
    return found


async def check_fits(
    settings: ServerSettings,
    plan: Plan = ask_planner,
    free: Callable[[int], int] = free_memory,
    spare_threads: Callable[[], int] = threads_left,
) -> None:
    """Raises NotHeld where memory or threads are too few, saying how many fit, and where the model can't be served.

    A replica is counted with the smallest window that its engine serves: with more room it takes more.
    """
    told = await _planned(settings, plan)
    assert told.need is not None
    need, model = told.need, settings.engine.model
    each = int(need.least_host_bytes / MEMORY_SHARE) + ENGINE_BYTES + REPLICA_BYTES
    left = max(0, free(model.keep_free_mib) - RAY_BYTES - told.embedding_bytes)
    own = f"{need.least_host_bytes / GIB:.2f} GiB of the model and {(each - need.least_host_bytes) / GIB:.2f} beside it"
    why = f"each takes {own}, and {left / GIB:.2f} GiB of the machine's memory is free"
    _check(settings, left // each, why, "take a smaller model, or free some memory")
    threads = max(0, spare_threads() - RAY_THREADS)
    why = f"each has some {REPLICA_THREADS} threads, and {threads} more may be started here"
    _check(settings, threads // REPLICA_THREADS, why, "raise `ulimit -u`, or docker's --pids-limit")


async def _planned(settings: ServerSettings, plan: Plan) -> Planned:
    """What the model takes, in any memory. Raises NotHeld."""
    try:
        told = await plan(settings.engine.model, None)
    except BackendFailed as error:
        raise NotHeld(error.message) from None
    if told.need is None:
        raise NotHeld(told.error or "the model can't be planned for")
    return told


def _check(settings: ServerSettings, fitting: int, why: str, otherwise: str) -> None:
    """Raise NotHeld where fewer fit than there may be. otherwise: what to do where none fits."""
    cluster = settings.cluster
    most = most_replicas(cluster)
    if fitting >= most:
        return
    option = "--replicas" if cluster.replicas > fitting else "--max-replicas"
    advice = f"ask for at most {fitting}" if fitting else otherwise
    raise NotHeld(f"{option}: {most} replicas don't fit here: {why}; {advice}")
