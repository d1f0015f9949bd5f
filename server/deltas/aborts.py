"""Stopping an answer, or asking how far it is, by a request of its own."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from tightrope.server.deltas.side_by_side import Deltas


@dataclass(slots=True, eq=False)
class _Watched:
    """One answer under way."""

    owner: bytes  # The key that has asked for it.
    is_aborted: bool = False
    texts: list[str] = field(default_factory=list)  # What has been written.
    waiting: asyncio.Task[object] | None = None  # This task waits for the next delta.

    def abort(self) -> None:
        self.is_aborted = True
        if self.waiting is not None:
            self.waiting.cancel()


class Aborts:
    """Which answers an abort stops: those under the same key."""

    def __init__(self) -> None:
        self._running: dict[str, dict[_Watched, None]] = {}  # They stand in the order in which they began.

    def abort(self, key: str) -> bool:
        """Stop what runs under the key; return whether anything did."""
        running = list(self._running.get(key, ()))
        for watched in running:
            watched.abort()
        return bool(running)

    def written(self, key: str, owner: bytes) -> str:
        """What there is of the answer that began last under the key, of those that this owner has asked for."""
        running = [watched for watched in self._running.get(key, ()) if watched.owner == owner]
        return "".join(running[-1].texts) if running else ""

    async def until_aborted(self, deltas: Deltas, key: str, owner: bytes = b"") -> Deltas:
        """The deltas, up to an abort, at which the work is cancelled."""
        watched = _Watched(owner)
        self._running.setdefault(key, {})[watched] = None
        try:
            async with aclosing(deltas):
                while not watched.is_aborted:
                    watched.waiting = task = asyncio.current_task()
                    try:
                        item = await anext(deltas, None)
                    except asyncio.CancelledError:
                        # as in asyncio.timeout: others may have cancelled the task as well
                        if watched.is_aborted and task is not None and not task.uncancel():
                            return
                        raise
                    finally:
                        watched.waiting = None
                    if item is None:
                        return
                    watched.texts.append(item[1].text)
                    yield item
        finally:
            del self._running[key][watched]
            if not self._running[key]:
                del self._running[key]
