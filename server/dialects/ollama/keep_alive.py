"""How long Ollama's clients want a model to stay loaded."""

import math
import re
from datetime import UTC, datetime, timedelta

from tightrope.engine.errors import InvalidRequest
from tightrope.server.models.model import Model

FOR_EVER = "2318-12-31T00:00:00Z"  # The model is not unloaded by itself.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_DURATION = re.compile(rf"-?(?:{_PART.pattern})+")
_LATEST_S = 366 * 86_400.0  # What is kept for longer is kept for ever.


def keep_alive_s(value: float | str) -> float:
    """Seconds of a `keep_alive`: a number, or a duration as Go writes it, 1h30m; below 0 it is for ever.

    Raises InvalidRequest.
    """
    if isinstance(value, str):
        text = value.strip()
        if _DURATION.fullmatch(text):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
            value = -seconds if text.startswith("-") else seconds
        else:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
    if math.isnan(value):
        raise InvalidRequest("keep_alive should be seconds, or a duration such as 5m", "keep_alive")
    return math.inf if value < 0 or value > _LATEST_S else float(value)


def expiry(model: Model, idle_s: float | None, now_s: float) -> str:
    """When it is unloaded if nobody asks for it. idle_s: after how long without; None: never. now_s: time.monotonic."""
    if idle_s is None or math.isinf(idle_s):
        return FOR_EVER
    left = timedelta(seconds=max(0.0, model.used_s + idle_s - now_s))
    return (datetime.now(UTC) + left).isoformat().replace("+00:00", "Z")
