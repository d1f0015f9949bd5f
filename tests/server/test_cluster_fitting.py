"""How many replicas a machine holds, which `tightrope cluster` tells before it starts Ray."""

import pytest

from tightrope.backends.memory import MEMORY_SHARE
from tightrope.backends.settings import ModelSettings
from tightrope.engine.process.planning import Need, Planned
from tightrope.engine.settings import EngineSettings
from tightrope.server.cluster.fitting import (
    ANY_NUMBER,
    RAY_BYTES,
    RAY_THREADS,
    REPLICA_BYTES,
    REPLICA_THREADS,
    NotHeld,
    check_fits,
    threads_left,
    within,
)
from tightrope.server.models.room import ENGINE_BYTES
from tightrope.server.settings.settings import ServerSettings, load_settings

GIB = 1 << 30
LEAST = Need(8 * GIB, 0, least_host_bytes=2 * GIB)
EACH = int(2 * GIB / MEMORY_SHARE) + ENGINE_BYTES + REPLICA_BYTES


def asked(**options: str) -> ServerSettings:
    return load_settings({name.replace("_", "-"): value for name, value in options.items()}, {})


async def check(settings: ServerSettings, told: Planned, free_bytes: int, threads: int = ANY_NUMBER) -> None:
    """Of a machine with so much free memory that may start so many threads."""

    async def plan(_: ModelSettings, __: int | None) -> Planned:
        return told

    await check_fits(settings, plan, lambda kept_mib: free_bytes - (kept_mib << 20), lambda: threads)


async def test_as_many_replicas_fit_as_there_is_room_for_with_the_smallest_window():
    free_bytes = RAY_BYTES + 3 * EACH
    await check(asked(replicas="3"), Planned(LEAST), free_bytes)
    for settings in (asked(replicas="4"), asked(replicas="3", keep_free_mib="1")):
        with pytest.raises(NotHeld, match=r"^--replicas: . replicas don't fit here: .* ask for at most [23]$"):
            await check(settings, Planned(LEAST), free_bytes)
    with pytest.raises(NotHeld, match=r"ask for at most 2$"):
        await check(asked(replicas="3"), Planned(LEAST, embedding_bytes=1), free_bytes)


async def test_the_option_that_asks_for_too_many_is_named():
    with pytest.raises(NotHeld, match=r"^--max-replicas: 4 replicas"):
        await check(asked(replicas="1", max_replicas="4"), Planned(LEAST), RAY_BYTES + 3 * EACH)


async def test_threads_are_counted_as_well():
    with pytest.raises(NotHeld, match=r"64 threads, and 100 more may be started here; ask for at most 1$"):
        await check(asked(replicas="2"), Planned(LEAST), 1 << 40, RAY_THREADS + 100)
    await check(asked(replicas="2"), Planned(LEAST), 1 << 40, RAY_THREADS + 2 * REPLICA_THREADS)


async def test_where_not_one_fits_it_says_what_to_do():
    with pytest.raises(NotHeld, match=r"take a smaller model, or free some memory$"):
        await check(asked(replicas="2"), Planned(LEAST), GIB)
    with pytest.raises(NotHeld, match=r"raise `ulimit -u`, or docker's --pids-limit$"):
        await check(asked(replicas="2"), Planned(LEAST), 1 << 40, 100)


async def test_a_model_that_can_not_be_served_is_told_as_its_plan_does():
    with pytest.raises(NotHeld, match=r"^no such file$"):
        await check(asked(), Planned(error="no such file"), 1 << 40)


@pytest.mark.quick
def test_some_threads_may_be_started_here():
    assert 0 < threads_left() <= ANY_NUMBER


@pytest.mark.parametrize(("asked_mib", "most_mib"), [(None, 3686), (1000, 1000), (9000, 3686)])
def test_a_replica_takes_its_share_whatever_others_have_taken_when_it_loads(asked_mib: int | None, most_mib: int):
    engine = EngineSettings(model=ModelSettings(model="m", max_memory_mib=asked_mib))
    assert within(engine, 4 * GIB).model.max_memory_mib == most_mib
