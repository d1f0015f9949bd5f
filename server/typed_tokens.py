"""What people wrote stays plain text, even where it looks like a special token.

Of a rendered chat nobody can tell who wrote what. So a chat whose words hold such texts is rendered twice: once as it
is, which is the prompt, and once with a mark before and behind each of them. Marks may change what a template does with
words, which is why they never come near the prompt itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from secrets import randbelow

from tightrope.engine.types import Span
from tightrope.server.content import Message

_NUM_DIGITS = 24


def new_mark() -> str:
    """A text that nobody wrote. Digits are what templates change least: no case, no blanks, nothing to escape."""
    return f"{randbelow(10**_NUM_DIGITS):0{_NUM_DIGITS}}"


@lru_cache(maxsize=4)
def special_pattern(special_texts: tuple[str, ...]) -> re.Pattern[str]:
    """Finds special-token texts, the longest of several. White space alone is text in every chat."""
    texts = sorted({text for text in special_texts if text.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


@dataclass(frozen=True, slots=True)
class TypedTokens:
    """Marks what looks like a special token in words, and finds it again in the prompt."""

    special: re.Pattern[str]
    opening: str = field(default_factory=new_mark)
    closing: str = field(default_factory=new_mark)

    def marked(self, message: Mapping[str, object]) -> Message:
        """The message with marks in every text but those that templates compare: role and type."""
        return {name: self._marked(item, name) for name, item in message.items()}

    def _marked(self, value: object, key: str = "") -> object:
        if isinstance(value, str):
            return value if key in ("role", "type") else self.special.sub(f"{self.opening}\\g<0>{self.closing}", value)
        if isinstance(value, dict):
            return {name: self._marked(item, name) for name, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list) else value

    def spans(self, prompt: str, marked: str) -> tuple[Span, ...]:
        """The prompt, cut at what people typed, as the render with marks tells.

        A typed text is plain only while both marks still enclose it: a template that cuts messages into pieces (at
        "</think>", say) may have torn them apart.
        """
        places = list(self.special.finditer(prompt))
        pieces: list[Span] = []
        end = 0
        for place, is_typed in zip(places, self._typed([place[0] for place in places], marked), strict=True):
            if is_typed:
                pieces += [Span(prompt[end : place.start()]), Span(place[0], parse_special=False)]
                end = place.end()
        return tuple(span for span in (*pieces, Span(prompt[end:])) if span.text)

    def _typed(self, texts: list[str], marked: str) -> list[bool]:
        """Which of the special texts of the prompt, in order, people typed.

        The render with marks holds the same ones, unless the template looked at the marks. Then those that it lacks
        count as typed if anyone typed the like.
        """
        told: list[tuple[str, bool]] = []
        enclosed = f"{self.opening}((?:(?!{self.opening}|{self.closing}).)*){self.closing}"
        for index, piece in enumerate(re.split(enclosed, marked, flags=re.DOTALL)):
            text = piece.replace(self.opening, "").replace(self.closing, "")
            told += [(found, index % 2 == 1) for found in self.special.findall(text)]
        typed_texts = {text for text, is_typed in told if is_typed}
        typed = [text in typed_texts for text in texts]
        same = SequenceMatcher(None, texts, [text for text, _ in told], autojunk=False)
        for start, start_told, length in same.get_matching_blocks():
            typed[start : start + length] = [is_typed for _, is_typed in told[start_told : start_told + length]]
        return typed
