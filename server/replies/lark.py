"""Texts of a model's own as parts of Lark grammars: marks are tokens where the vocabulary has special ones for them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

REST = r"/(?s:.*)/"  # Any text; a special token ends it.


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a served model spells marks.

    `ids` are those of the marks that are one special token each, `others` of those that are one token of another kind,
    whose text may be written in other tokens as well.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)

    def of(self, text: str) -> str:
        """The text as a sequence of Lark, not empty."""
        if not self.ids:
            return literal(text)
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(self.ids, key=len, reverse=True)))})", text)
        return " ".join(f"<[{self.ids[piece]}]>" if piece in self.ids else literal(piece) for piece in pieces if piece)

    def is_token(self, text: str) -> bool:
        """Whether the text is one special token, which no plain text holds."""
        return text in self.ids

    def parted(self, text: str) -> tuple[str, str]:
        """The text before the first special token in it, and the text from there on; without one that is empty."""
        place = min((place for mark in self.ids if (place := text.find(mark)) >= 0), default=len(text))
        return text[:place], text[place:]

    def free(self, *, besides: str = "") -> str:
        """Lark for any text with any of the marks in it; `besides` isn't in its beginning."""
        text = REST
        if besides and not self.is_token(besides):
            text = f"{REST} & ~{beginning_with(besides)}"
        marks = [f"<[{token_id}]>" for mark, token_id in self.ids.items() if mark != besides]
        more = f" (({' | '.join(marks)}) TEXT)*" if marks else ""
        return f"start: FREE{more}\nFREE: {text}\nTEXT: {REST}"


def literal(text: str) -> str:
    """A text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)


def quoted(text: str) -> str:
    """A text inside a regular expression of Lark."""
    return re.sub(r"([\\^$.|?*+()\[\]{}/])", r"\\\1", text).replace("\n", r"\n")


def beginning_with(text: str) -> str:
    """The regular expression of all texts that begin with this one, perhaps behind blanks."""
    return rf"/\s*{quoted(text)}(?s:.*)/"
