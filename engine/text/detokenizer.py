"""Bytes of tokens in, text that is ready to be shown out; finds stop strings on the way.

What comes out never depends on how the text was cut into tokens: of several stop strings the one that is complete
first ends the text, and of two that end at the same place the longer one.
"""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """The text of one answer.

    Without `keep_stop_text` the stop string is cut off, so a tail that may still become one is held back. With it,
    nothing is held back, and the text ends right after the stop string, inside a token if need be.
    """

    def __init__(self, stop: Sequence[str] = (), *, keep_stop_text: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._keep = keep_stop_text
        self._longest = max(map(len, self._stop), default=0)
        self._seen = ""  # It is the end of what was shown, as far as a stop string may reach back into it.
        self._held = ""  # It is decoded, and not shown yet.
        self.stopped_by: str | None = None

    def copy(self) -> "Detokenizer":
        """Another one that stands where this one stands now."""
        made = Detokenizer(self._stop, keep_stop_text=self._keep)
        made._decoder.setstate(self._decoder.getstate())
        made._seen, made._held, made.stopped_by = self._seen, self._held, self.stopped_by
        return made

    def feed(self, raw: bytes, *, watch: bool = True) -> tuple[str, str]:
        """Take one token's bytes; return (what to show now, what this token added to the text).

        The second is "" while a character is torn between tokens. Without `watch`, stop strings count as plain text.
        After `stopped_by` is set, nothing may be fed.
        """
        assert self.stopped_by is None
        piece = self._decoder.decode(raw)
        if not self._stop or not piece:
            return piece, piece
        if not watch:
            shown, self._held, self._seen = self._held + piece, "", ""
            return shown, piece
        return self._search(piece)

    def _search(self, piece: str) -> tuple[str, str]:
        window = self._seen + self._held + piece
        first_new = len(window) - len(piece)
        found = self._first_stop(window, first_new)
        shown_from = len(self._seen)
        if found is not None:
            start, end = found
            self.stopped_by = window[start:end]
            self._held = ""
            self._decoder.reset()  # Half a character after the stop string is no part of the text.
            cut = end if self._keep else max(start, shown_from)
            return window[shown_from:cut], window[first_new:end]
        hold = 0 if self._keep else self._possible_start(window)
        shown = window[shown_from : len(window) - hold]
        self._held = window[len(window) - hold :]
        # Without keep_stop_text a match can't begin in text that was shown: such text was no beginning of a stop.
        self._seen = window[-(self._longest - 1) :] if self._keep and self._longest > 1 else ""
        return shown, piece

    def _first_stop(self, window: str, first_new: int) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first; its end lies in the new part of the window."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            start = window.find(stop, max(0, first_new - len(stop) + 1))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or end < best[1] or (end == best[1] and start < best[0]):
                best = (start, end)
        return best

    def _possible_start(self, window: str) -> int:
        """How many characters at the window's end are the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    def flush(self) -> str:
        """The rest of the text, when no more tokens come. A character that stayed torn is left out."""
        rest, self._held = self._held, ""
        return rest
