"""A reader of answers: fed text as it is written, it gives events as early as they are certain.

Each family's reader is written as if the whole text were there: its `read` is a generator that yields events, and None
where it can't go on without more text. The steps that look at text are all here, and none of them depends on how it
was cut; so neither does a reader.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

from tightrope.server.replies.events import Content, Event

T = TypeVar("T")
Steps = Generator[Event | None, None, T]


class Reader(ABC):
    """Reads one answer."""

    def __init__(self) -> None:
        self.held = ""  # It has come, and is not read yet.
        self.is_end = self.is_cut = False
        self._steps = self.read()

    @abstractmethod
    def read(self) -> Steps[None]:
        """Read all there is, up to the end."""

    def feed(self, text: str) -> list[Event]:
        """What is certain with some more text."""
        self.held += text
        return self._go()

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The rest, when no more text comes. is_cut: the model had more to say, so half a mark is no text."""
        self.is_end, self.is_cut = True, is_cut
        return self._go()

    def _go(self) -> list[Event]:
        return list(iter(partial(next, self._steps, None), None))

    # ---- steps ----

    def give_until(self, marks: Sequence[str], made: Callable[[str], Event | None] = Content) -> Steps[str | None]:
        """Give text out up to the first of the marks, none of which begins another; take and return it.

        None at the end of the text.
        """
        while True:
            place, mark = first_mark(self.held, marks)
            if mark is not None:
                before, self.held = self.held[:place], self.held[place + len(mark) :]
                if before and (event := made(before)) is not None:
                    yield event
                return mark
            num_kept = max((overlap(self.held, mark) for mark in marks), default=0)
            if self.is_end and not self.is_cut:
                num_kept = 0
            shown, self.held = self.held[: len(self.held) - num_kept], self.held[len(self.held) - num_kept :]
            if shown and (event := made(shown)) is not None:
                yield event
            if self.is_end:
                self.held = ""
                return None
            yield None

    def take_until(self, *marks: str) -> Steps[tuple[str, str | None]]:
        """Take text up to the first of the marks, and the mark: (text, mark), or (all the rest, None)."""
        longest, start = max(map(len, marks)), 0
        while True:
            place, mark = first_mark(self.held, marks, start)
            if mark is not None:
                text, self.held = self.held[:place], self.held[place + len(mark) :]
                return text, mark
            if self.is_end:
                text, self.held = self.held, ""
                return text, None
            start = max(0, len(self.held) - longest + 1)
            yield None

    def take_blanks(self) -> Steps[str]:
        """Take white space."""
        while not (rest := self.held.lstrip()) and not self.is_end:
            yield None
        blanks, self.held = self.held[: len(self.held) - len(rest)], rest
        return blanks

    def take_if(self, *marks: str) -> Steps[str | None]:
        """Take the one of the marks that comes next; None where none does. Half of one, where it was cut, is gone."""
        while True:
            mark = next((mark for mark in marks if self.held.startswith(mark)), None)
            if mark is not None:
                self.held = self.held[len(mark) :]
                return mark
            may_become = any(mark.startswith(self.held) for mark in marks)
            if self.is_end and self.is_cut and may_become:
                self.held = ""
            if self.is_end or not may_become:
                return None
            yield None


class Trimmed:
    """Makes events of pieces of text, without the white space at either end of the whole."""

    def __init__(self, made: Callable[[str], Event], *, keeps_start: bool = False) -> None:
        self._made = made
        self._has_begun = keeps_start
        self._blanks = ""

    def __call__(self, text: str) -> Event | None:
        text = self._blanks + text
        text = text if self._has_begun else text.lstrip()
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if not shown:
            return None
        self._has_begun = True
        return self._made(shown)


def first_mark(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str | None]:
    """Where the first of the marks stands from `start` on, and which it is."""
    found = [(place, mark) for mark in marks if (place := text.find(mark, start)) >= 0]
    return min(found) if found else (len(text), None)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text are the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
