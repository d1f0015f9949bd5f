"""Text that must not be read as marks, for vocabularies that would find them in any text."""

import re
from collections.abc import Collection


def marks_pattern(marks: Collection[str]) -> re.Pattern[str] | None:
    """Finds the marks in a text, the longest of several; None for no marks. One character is too short to be cut."""
    texts = sorted((mark for mark in marks if len(mark) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def cut_at_marks(text: str, marks: re.Pattern[str]) -> list[str]:
    """The text in pieces, none of which holds a whole mark: each mark is cut behind its first character.

    Tokenized one by one, the pieces give the bytes of the text and none of the marks' tokens.
    """
    pieces, end = [], 0
    while match := marks.search(text, end):
        pieces.append(text[end : match.start() + 1])
        end = match.start() + 1  # another mark may begin inside this one
    return [*pieces, text[end:]]
