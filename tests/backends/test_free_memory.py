"""What an engine may take of the machine's memory."""

import pytest

from tightrope.backends import memory
from tightrope.backends.memory import GIB, MIB, free_for
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("taken_by_others", [0, 3 * GIB, 6 * GIB])
def test_one_of_several_engines_has_its_share_whatever_the_others_have_taken(
    monkeypatch: pytest.MonkeyPatch, taken_by_others: int
) -> None:
    settings = ModelSettings(model="m", most_host_mib=4096)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 12 * GIB - taken_by_others)
    assert free_for(settings) == 4 * GIB


def test_a_share_is_no_more_than_is_free_and_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 3 * GIB)
    settings = ModelSettings(model="m", keep_free_mib=512, most_host_mib=4096)
    assert free_for(settings) == 3 * GIB - 512 * MIB
    assert free_for(ModelSettings(model="m")) == 3 * GIB
