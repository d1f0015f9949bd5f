"""What two replicas behind one front were measured to do."""

import json

import pytest

from bench import report
from bench.cluster import FIRST_BYTE_S, SPEED

pytestmark = pytest.mark.quick

RESULTS = json.loads((report.RESULTS / "cluster.json").read_text())["results"]


def test_every_part_that_was_measured_holds_its_bar():
    assert {name for name, part in RESULTS.items() if not part["met"]} == set()
    assert RESULTS["first-byte"]["added_s"] <= FIRST_BYTE_S
    assert RESULTS["speed"]["ratio"]["median"] >= SPEED
