"""Tells whoever asked which tokens this engine holds: see backends/holdings.py."""

from collections.abc import Callable
from itertools import count

from tightrope.backends.holdings import Holdings, News
from tightrope.engine.core import EngineCore
from tightrope.engine.process.wire import EngineEnd, Held, HeldBlocks


class HeldTeller:
    """Sends what has changed, once somebody has asked. All methods are the loop's."""

    def __init__(self, core: EngineCore, end: EngineEnd, wake: Callable[[], None]) -> None:
        """wake: has the loop come around; may be called by any thread."""
        self._core, self._end, self._wake = core, end, wake
        self._holdings: Holdings | None = None
        self._numbers = count()
        self._adapters: dict[str, str] | None = None  # These were told.
        self._is_awake = False  # The loop was told already that the store has news.

    def begin(self) -> None:
        """Tell all that there is next, and from then on what changes."""
        self._adapters = None
        if self._holdings is None:
            self._holdings = Holdings(self._on_stored)
            self._core.report_to(self._holdings)
        self._holdings.begin()

    def send(self) -> None:
        """Tell what is new, if anything is and somebody has asked."""
        if self._holdings is None:
            return
        self._is_awake = False
        cached, stored = self._holdings.take()
        adapters = self._core.adapters.fingerprints
        if not (cached or stored or adapters != self._adapters):
            return
        told = None if adapters == self._adapters else adapters
        self._adapters = adapters
        holdings, number = self._holdings, next(self._numbers)
        blocks = _blocks(cached), _blocks(stored)
        self._end.send(Held(number, *blocks, holdings.fingerprint, holdings.read_share, told))

    def _on_stored(self) -> None:
        """Pieces are written and found beside the loop, which may wait for requests meanwhile."""
        if not self._is_awake:
            self._is_awake = True
            self._wake()


def _blocks(news: News) -> HeldBlocks:
    return HeldBlocks(news.is_whole, news.stride, news.added, news.removed)
