"""How long an engine may take, and how long until one is back."""

import pytest

from tightrope.engine.process.watch import Activity
from tightrope.engine.queueing import back_in_s

pytestmark = pytest.mark.quick


def test_a_step_may_take_as_long_as_its_tokens_took_before():
    activity = Activity(patience_s=300.0)
    activity.begin("step", 512)
    first = activity.task
    activity.end()
    activity.begin("step", 24_000)
    assert first is not None
    assert activity.task is not None
    assert first.allowed_s == 300 + 512  # a token a second, while nothing is known
    assert 300 < activity.task.allowed_s < 300 + 24_000


@pytest.mark.parametrize(
    ("load_s", "taken_s", "expected_s"),
    [(0.0, 0.0, 1), (0.0, 7.2, 8), (30.0, 2.5, 28), (30.0, -5.0, 35), (30.0, 29.9, 1), (30.0, 45.0, 45)],
)
def test_an_engine_is_back_when_the_last_one_was_or_in_as_long_as_it_has_taken(
    load_s: float, taken_s: float, expected_s: int
):
    assert back_in_s(load_s, taken_s) == expected_s
