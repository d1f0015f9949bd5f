"""Whether a model fits beside others: by its own plan, and by what the others were promised and haven't taken yet."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from checkout import ROOT
from one_model import no_other

from tightrope.backends.locate import bundled_model
from tightrope.backends.memory import MEMORY_SHARE
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.errors import BackendFailed
from tightrope.engine.process.planning import Need, Planned, plan
from tightrope.server.models.model import Model
from tightrope.server.models.room import ENGINE_BYTES, Room
from tightrope.server.settings.settings import ServerSettings

GIB = 1 << 30


class Taken:
    """The engine of a model that has so much memory to itself."""

    info = None
    adapters: Mapping[str, str] = MappingProxyType({})

    def __init__(self, private_bytes: int = 0) -> None:
        self.private_bytes = private_bytes


def model(name: str, private_bytes: int = 0, *, path: str | None = None) -> Model:
    settings = ServerSettings.model_validate({"engine": {"model": {"model": path or name}}})
    return Model(name, settings, no_other, Taken(private_bytes))


def room(free_bytes: int, refused: int = 0, **needs: Need) -> tuple[Room, list[tuple[str, int | None]]]:
    """That of a machine with so much free memory; models are refused in memories smaller than `refused`."""
    asked: list[tuple[str, int | None]] = []

    async def planned(settings: ModelSettings, host_bytes: int | None) -> Planned:
        name = Path(settings.model or "").name
        asked.append((name, host_bytes))
        is_small = host_bytes is not None and host_bytes < refused
        return Planned(needs[name], "it is too large" if is_small else None)

    return Room(planned, lambda: free_bytes), asked


def needed(num_bytes: int) -> int:
    """Free memory in which a model that takes so much just fits."""
    return int(num_bytes / MEMORY_SHARE) + ENGINE_BYTES + 1


async def test_what_others_have_taken_is_not_free_and_what_they_may_still_take_is_kept() -> None:
    need = Need(2 * GIB, GIB)
    for private, promised in ((0, 3 * GIB + ENGINE_BYTES), (GIB, 2 * GIB + ENGINE_BYTES), (9 * GIB, 0)):
        other, free = model("other", private), promised + needed(2 * GIB)
        fits, _ = room(free, other=need, new=need)
        assert await fits.promised_bytes([other]) == promised
        assert await fits.has_room(model("new"), [other])
        lacks, _ = room(free - 2, other=need, new=need)
        assert not await lacks.has_room(model("new"), [other])


async def test_what_is_to_be_left_free_is_not_free() -> None:
    need = Need(2 * GIB, 0)
    for kept_mib, fits in ((0, True), (1, False)):
        settings = ServerSettings.model_validate({"engine": {"model": {"model": "new", "keep_free_mib": kept_mib}}})
        new = Model("new", settings, no_other, Taken())
        machine, _ = room(needed(2 * GIB), other=need, new=need)
        assert await machine.has_room(new, [model("other", 9 * GIB)]) is fits


@pytest.mark.parametrize("max_mib", [2048, 2047])
async def test_a_model_that_needs_more_than_it_may_take_has_no_room_in_any_machine(max_mib: int) -> None:
    settings = ServerSettings.model_validate({"engine": {"model": {"model": "new", "max_memory_mib": max_mib}}})
    new = Model("new", settings, no_other, Taken())
    machine, asked = room(100 * GIB, other=Need(0, 0), new=Need(2 * GIB, 0))
    assert await machine.has_room(new, [model("other", 0)]) is (max_mib == 2048)
    assert max_mib == 2048 or asked[-1] == ("new", max_mib << 20)


async def test_a_model_that_fits_into_nothing_is_refused_before_others_go() -> None:
    needs = {"other": Need(GIB, 0), "new": Need(100 * GIB, 0)}
    lacks, asked = room(8 * GIB, refused=50 * GIB, **needs)
    with pytest.raises(BackendFailed, match=r"the model `new` can't be loaded: it is too large"):
        await lacks.has_room(model("new"), [model("other", 2 * GIB)])
    assert asked[-1] == ("new", int((10 * GIB - ENGINE_BYTES) * MEMORY_SHARE))
    smaller, _ = room(8 * GIB, refused=5 * GIB, **needs)
    assert not await smaller.has_room(model("new"), [model("other", 2 * GIB)])


async def test_a_card_has_what_it_says_it_has_each_time() -> None:
    on_card = Need(0, 0, card_bytes=8 * GIB, card_free_bytes=8 * GIB)
    fits, asked = room(100 * GIB, other=on_card, new=on_card)
    new, other = model("new"), model("other")
    other.state = "loaded"
    for _ in range(2):
        assert await fits.has_room(new, [other])
    assert [name for name, _ in asked] == ["new", "other", "new"]
    lacks, _ = room(100 * GIB, other=on_card, new=Need(0, 0, card_bytes=8 * GIB, card_free_bytes=8 * GIB - 1))
    assert not await lacks.has_room(new, [other])


async def test_a_model_is_planned_again_when_its_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_text("weights")
    fits, asked = room(100 * GIB, other=Need(GIB, 0), new=Need(GIB, 0))
    new, other = model("new", path=str(path)), model("other")
    for _ in range(2):
        await fits.has_room(new, [other])
    assert len(asked) == 2
    os.utime(path, (1, 1))
    await fits.has_room(new, [other])
    assert [name for name, _ in asked] == ["new", "other", "new"]


@pytest.mark.plain
async def test_the_process_that_plans_says_what_the_model_takes_and_where_it_is_refused() -> None:
    cache = CacheSettings(tokens=2048)
    settings = ModelSettings(model=str(bundled_model()), gguf_engine="llama.cpp", max_model_len=2048, cache=cache)
    told = await plan(settings, 100 << 20)
    assert told.error is None
    assert told.refusal is not None
    assert told.need is not None
    weights = bundled_model().stat().st_size
    assert weights < told.need.host_bytes < 10 * weights
    assert 0 < told.need.run_bytes < told.need.host_bytes
    assert (told.need.card_bytes, told.need.card_free_bytes) == (0, 0)
    kept = await plan(settings.model_copy(update={"cache": CacheSettings(tokens=2048, host_mib=1024)}))
    whole = told.need.host_bytes + GIB
    assert kept.need == Need(whole, 0, least_host_bytes=whole), "it is not loaded without what chats were promised"
    broken = await plan(ModelSettings(model=str(ROOT / "README.md")))
    assert broken.need is None
    assert "README.md: not a GGUF file" in (broken.error or "")
