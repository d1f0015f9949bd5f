"""Telling others which tokens llama.cpp's cache holds: see backends/holdings.py."""

from collections.abc import Callable, Iterable

from tightrope.backends.gguf.entry import Entry
from tightrope.backends.holdings import BLOCK, Holdings, chain


class HeldEntries:
    """Tells of the whole blocks of tokens that entries hold."""

    def __init__(self, holdings: Holdings, root_of: Callable[[str], bytes], entries: Iterable[Entry]) -> None:
        """root_of: what stands before the first block of a namespace. entries: those that there are now."""
        self._holdings, self._root_of = holdings, root_of
        self._told: dict[Entry, list[bytes]] = {}
        for entry in entries:
            self.see(entry)

    def see(self, entry: Entry, *, is_gone: bool = False) -> None:
        """Tell of an entry to which tokens were added, or taken from its end; before any other change, `is_gone`."""
        told = self._told.setdefault(entry, [])
        num_blocks = 0 if is_gone else entry.length // BLOCK
        if num_blocks < len(told):
            self._holdings.remove("cached", told[num_blocks:])
            del told[num_blocks:]
        elif num_blocks > len(told):
            new = entry.tokens[len(told) * BLOCK : num_blocks * BLOCK].tolist()
            blocks = list(chain(told[-1] if told else self._root_of(entry.namespace), new))
            self._holdings.add("cached", blocks, len(told))
            told += blocks
        if not told:
            del self._told[entry]
