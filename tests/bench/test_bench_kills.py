"""What the measurement of kills makes of what it has seen."""

import pytest

from bench.kills import TOLD, End, Found, Kill, Outcome, verdicts
from bench.served import Stopped
from bench.watch import ProcessUse, Reading

pytestmark = pytest.mark.quick

RESTED = Reading(0.0, 0, ProcessUse(1, 60.0, 18, 4), None, 0.0)


def found(*outcomes: Outcome, back_s: float | None = 5.0, after: Reading = RESTED, left: int = 0) -> Found:
    return Found([Kill("idle", back_s)], outcomes, RESTED, after, Stopped(0, ["-m tightrope.processes"] * left, []), [])


def missed(seen: Found) -> list[object]:
    return [bar["name"] for bar in verdicts(seen) if not bar["met"]]


def test_streams_that_went_on_and_requests_that_were_answered_are_what_should_be():
    assert missed(found(Outcome("decode", True, "whole"), Outcome("decode", False, "whole"))) == []


def test_a_stream_that_was_told_of_an_error_was_not_written_to_its_end():
    assert missed(found(Outcome("decode", True, "error event"))) == [
        "streams that had begun and were not written to their end"
    ]


@pytest.mark.parametrize("end", ["error", "cut", "silent"])
def test_a_client_that_was_told_nothing_misses_its_bar(end: End):
    assert end not in TOLD
    assert missed(found(Outcome("decode", True, end))) == ["streams that had begun and were not written to their end"]
    assert missed(found(Outcome("decode", False, end))) == ["requests that waited and were not answered"]


def test_engines_that_come_late_or_never_and_what_stays_behind_miss_theirs():
    assert missed(found(back_s=21.0)) == ["seconds until it serves again, the longest but 1 %"]
    assert "kills after which none came back" in missed(found(back_s=None))
    assert missed(found(left=1)) == ["processes and temporary files left"]
    more = Reading(0.0, 0, ProcessUse(1, 60.0, 19, 4), None, 0.0)
    assert missed(found(after=more)) == ["descriptors of the front more than before"]
