"""Stopping an answer by a request of its own."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from tightrope.server.deltas.side_by_side import Deltas


@dataclass(slots=True, eq=False)
class _Watched:
    """One answer under way."""

    is_aborted: bool = False
    waiting: asyncio.Task[object] | None = None  # This task waits for the next delta.

    def abort(self) -> None:
        self.is_aborted = True
        if self.waiting is not None:
            self.waiting.cancel()


class Aborts:
    """Which answers an abort stops: those under the same key."""

    def __init__(self) -> None:
        self._running: dict[str, set[_Watched]] = {}

    def abort(self, key: str) -> bool:
        """Stop what runs under the key; return whether anything did."""
        running = self._running.get(key, set())
        for watched in running:
            watched.abort()
        return bool(running)

    async def until_aborted(self, deltas: Deltas, key: str) -> Deltas:
        """The deltas, up to an abort, at which the work is cancelled."""
        watched = _Watched()
        self._running.setdefault(key, set()).add(watched)
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
                    yield item
        finally:
            self._running[key].discard(watched)
            if not self._running[key]:
                del self._running[key]
