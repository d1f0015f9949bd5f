"""The process that says what a model would take: reads a PlanAsked from its standard input, and writes a Planned.

The front starts it by `python -m tightrope.engine.process.planner`.
"""

import os
import sys

import msgspec

from tightrope.backends.detect import outline
from tightrope.backends.embedding.opening import footprints, taken_bytes
from tightrope.backends.errors import BackendError
from tightrope.backends.planning import LEAST_WINDOW, Outline
from tightrope.backends.settings import ModelSettings
from tightrope.engine.console import log_to_stderr
from tightrope.engine.process.planning import Need, PlanAsked, Planned

ANY_BYTES = 1 << 50  # All models fit in it.


def planned(settings: ModelSettings, host_bytes: int | None) -> Planned:
    """What it takes in any memory, and whether it may be served in a machine's of `host_bytes`."""
    reserve = settings.cache.host_reserve_bytes  # An engine doesn't start, or gets a smaller window, without these.
    try:
        beside = taken_bytes(footprints(settings))
        found = outline(settings, ANY_BYTES)
        if found.device != "cpu":
            whole = outline(settings, ANY_BYTES, (ANY_BYTES,) * max(1, len(found.shares)))
            runs = settings.cache.host_run_bytes(_cache_bytes(whole), ANY_BYTES)
            host_bytes = found.host_bytes + found.process_bytes + reserve
            need = Need(host_bytes, runs - reserve, _taken(whole), found.memory_bytes, host_bytes)
            return Planned(need, embedding_bytes=beside)
        refusal = None if host_bytes is None else outline(settings, host_bytes).refusal
        runs = settings.cache.host_run_bytes(_cache_bytes(found), ANY_BYTES)
        taken, least = (_taken(one) + one.process_bytes + reserve for one in (found, _smallest(settings, found)))
        return Planned(Need(taken, runs - reserve, least_host_bytes=least), refusal or found.refusal, None, beside)
    except BackendError as error:
        return Planned(error=str(error))


def _smallest(settings: ModelSettings, found: Outline) -> Outline:
    """With the smallest window and cache that are served; as it is found where these are asked for."""
    if settings.max_model_len or settings.cache.tokens:
        return found
    tokens = min(LEAST_WINDOW, found.window)
    cache = settings.cache.model_copy(update={"tokens": tokens})
    return outline(settings.model_copy(update={"max_model_len": tokens, "cache": cache}), ANY_BYTES)


def _taken(found: Outline) -> int:
    return found.weight_bytes + found.workspace_bytes + _cache_bytes(found)


def _cache_bytes(found: Outline) -> int:
    return 0 if found.chosen is None else found.chosen.cache_bytes


def main() -> None:
    """Entry point of the process."""
    log_to_stderr("warning")
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Libraries print what would be no answer.
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=PlanAsked)
    made = planned(ModelSettings.model_validate_json(asked.settings), asked.host_bytes)
    with open(answers, "wb") as file:
        file.write(msgspec.json.encode(made))


if __name__ == "__main__":
    main()
