"""`tightrope sessions`: the chats that a folder holds, listed and deleted."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.backends.errors import BackendError
from tightrope.engine.console import printable
from tightrope.server.cli.failures import CommandFailed, UsageError

if TYPE_CHECKING:
    from tightrope.backends.sessions.listing import Chat

NAME_LENGTH = 12  # Hexadecimal digits of a chat's name that are shown.
DAY_S = 86_400


def sessions(folder: str, delete: str | None, older_than: str | None) -> int:
    """List the chats, or delete some; return the exit status. Raises CommandFailed and UsageError in one line.

    delete: names as they are listed, with commas between, or "all"; older_than: days, perhaps with a decimal point.
    """
    from tightrope.backends.sessions import listing  # Its libraries take a moment to import.
    from tightrope.backends.sessions.folder import Folder

    days = _days(older_than)
    try:
        opened = Folder(Path(folder).expanduser(), create=False)
    except BackendError as error:
        raise CommandFailed(str(error)) from None
    chats = listing.chats_in(opened)
    if delete is None and days is None:
        print("\n".join(map(printable, to_lines(chats, time.time()))))
        return 0
    chosen = _named(chats, delete) if delete is not None else chats
    if days is not None:
        chosen = [chat for chat in chosen if time.time() - chat.used_s > days * DAY_S]
    try:
        if delete == "all" and days is None:
            opened.clear()
        else:
            listing.delete(opened, chosen, [chat for chat in chats if chat not in chosen])
    except OSError as error:
        raise CommandFailed(f"{folder}: chats can't be deleted: {error.strerror}") from None
    print(f"deleted {len(chosen)} of {len(chats)} chats")
    return 0


def to_lines(chats: "list[Chat]", now_s: float) -> list[str]:
    """The list as people read it."""
    if not chats:
        return ["no chats"]
    lines = [f"{'name':{NAME_LENGTH}}  {'tokens':>8}  {'MiB':>8}  {'unused for':>10}  model"]
    for chat in chats:
        name, size = chat.name.hex()[:NAME_LENGTH], chat.num_bytes / (1 << 20)
        lines.append(f"{name}  {chat.num_tokens:8}  {size:8.1f}  {_age(now_s - chat.used_s):>10}  {chat.model}")
    return lines


def _age(seconds: float) -> str:
    for size, unit in ((DAY_S, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _named(chats: "list[Chat]", names: str) -> "list[Chat]":
    if names == "all":
        return chats
    chosen: list[Chat] = []
    for name in (part.strip() for part in names.split(",")):
        found = [chat for chat in chats if re.fullmatch("[0-9a-f]{4,40}", name) and chat.name.hex().startswith(name)]
        if len(found) != 1:
            what = "several chats begin so" if found else "no chat is called so"
            raise UsageError(f"--delete: {name[:60]!r}: {what}; give names as they are listed, or all")
        chosen += found
    return chosen


def _days(text: str | None) -> float | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise UsageError(f"--older-than: a number of days is expected, such as 30, not {text[:60]!r}")
    return float(text)
