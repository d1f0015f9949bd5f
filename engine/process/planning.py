"""What a model would take of the machine's memory and of cards, as a process without a model library may ask.

Imports neither torch nor transformers nor llama_cpp.
"""

import asyncio
from contextlib import suppress

import msgspec
from msgspec import Struct

from tightrope.backends.settings import ModelSettings
from tightrope.engine.errors import BackendFailed
from tightrope.processes import child_command, child_environment

PLAN_S = 1800.0  # Libraries and headers may come from a slow disk, and a model of the hub is fetched.


class Need(Struct, frozen=True):
    """Memory that a model takes with its whole window, in bytes.

    host_bytes: of the machine's memory, with what chats that have left the cache are to have in any case. run_bytes:
    what they may take of it beside that. card_free_bytes: what the cards that it would lie on had left when that was
    asked. least_host_bytes: like host_bytes, with the smallest window that is served.
    """

    host_bytes: int
    run_bytes: int
    card_bytes: int = 0
    card_free_bytes: int = 0
    least_host_bytes: int = 0


class PlanAsked(Struct, frozen=True):
    """settings: a ModelSettings as JSON. host_bytes: the machine's memory; None is any."""

    settings: str
    host_bytes: int | None = None


class Planned(Struct, frozen=True):
    """error: why it can't be served at all; refusal: why not in the memory that was named.

    embedding_bytes: what the models take that embed or rank texts beside it.
    """

    need: Need | None = None
    refusal: str | None = None
    error: str | None = None
    embedding_bytes: int = 0


async def plan(settings: ModelSettings, host_bytes: int | None = None) -> Planned:
    """Ask a process that is started for it. host_bytes: the machine's memory to plan with; None is any."""
    process = await asyncio.create_subprocess_exec(
        *child_command("tightrope.engine.process.planner"),
        env=child_environment(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the server.
    )
    asked = msgspec.json.encode(PlanAsked(settings.model_dump_json(), host_bytes))
    try:
        async with asyncio.timeout(PLAN_S):
            told, _ = await process.communicate(asked)
    except TimeoutError:
        raise BackendFailed(f"its files were not read within {PLAN_S:.0f} s") from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    try:
        return msgspec.json.decode(told, type=Planned)
    except msgspec.MsgspecError:
        raise BackendFailed(f"the process that reads its files ended with status {process.returncode}") from None
