"""What an engine may take of the machine's memory."""

import pytest

from tightrope.backends import memory
from tightrope.backends.memory import GIB, MIB, free_for, usable_memory
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("taken_by_others", [0, 3 * GIB, 6 * GIB])
def test_what_an_engine_takes_at_most_does_not_depend_on_what_others_have_taken(
    monkeypatch: pytest.MonkeyPatch, taken_by_others: int
) -> None:
    settings = ModelSettings(model="m", max_memory_mib=4096)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 12 * GIB - taken_by_others)
    assert usable_memory(settings) == 4 * GIB


def test_no_more_is_taken_than_is_free_and_not_kept_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 3 * GIB)
    settings = ModelSettings(model="m", keep_free_mib=512, max_memory_mib=4096)
    assert free_for(settings) == 3 * GIB - 512 * MIB
    assert free_for(ModelSettings(model="m")) == 3 * GIB
