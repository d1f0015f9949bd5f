"""bench/results/fleet.json, in parts that are measured apart, each with what it was measured on."""

import json
from typing import Any

from bench import report

NAME = "fleet"
PATH = report.RESULTS / f"{NAME}.json"


def read() -> dict[str, Any]:
    """What is there already."""
    found: dict[str, Any] = json.loads(PATH.read_text("utf-8"))["results"] if PATH.exists() else {}
    return found


def put(part: str, value: object) -> None:
    """Put a part in the place of what was there of it."""
    where = report.environment()
    measured = {"command": where["command"], "date": where["date"], "machine": where["machine"]}
    parts = read()
    parts.setdefault("measured", {})[part] = measured
    report.write(NAME, {**parts, part: value})
