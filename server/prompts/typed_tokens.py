"""What people wrote stays plain text, even where it looks like a special token.

Of a rendered chat nobody can tell who wrote what. So a chat whose words hold such texts is rendered twice: once as it
is, which is the prompt, and once with a mark before and behind each of them. Marks may change what a template does with
words, which is why they never come near the prompt itself. A template may also join words, such as the parts of one
message, to a text that none of them holds: so pieces of such texts at the ends of words are marked as well.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from secrets import randbelow

from tightrope.backends.plain_text import any_of
from tightrope.engine.types import Span
from tightrope.server.prompts.content import Message

_NUM_DIGITS = 24
MOST_COMPARED = 1_000_000  # To compare so many pairs of texts takes tenths of a second.


def new_mark() -> str:
    """A text that nobody wrote. Digits are what templates change least: no case, no blanks, nothing to escape."""
    return f"{randbelow(10**_NUM_DIGITS):0{_NUM_DIGITS}}"


@dataclass(frozen=True, slots=True)
class SpecialTexts:
    """The texts of special tokens, and how they are found. White space alone is text in every chat."""

    pattern: re.Pattern[str]  # It finds the longest of several.
    heads: frozenset[str]  # They begin with these, short of the whole.
    tails: frozenset[str]
    longest: int

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where special texts stand in a text, and pieces of them at its ends, but for blanks; none overlap."""
        found = [match.span() for match in self.pattern.finditer(text)]
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        lengths = range(min(self.longest, end - start), 0, -1)
        tail = next((length for length in lengths if text[start : start + length] in self.tails), 0)
        head = next((length for length in lengths if text[end - length : end] in self.heads), 0)
        if tail and start + tail <= (found[0][0] if found else end):
            found.insert(0, (start, start + tail))
        if head and end - head >= (found[-1][1] if found else start):
            found.append((end - head, end))
        return found


@lru_cache(maxsize=4)
def special_texts(texts: tuple[str, ...]) -> SpecialTexts:
    """How to find these texts."""
    visible = [text for text in texts if text.strip()]
    return SpecialTexts(
        re.compile(any_of(visible)),
        heads=frozenset(text[:length] for text in visible for length in range(1, len(text))),
        tails=frozenset(text[-length:] for text in visible for length in range(1, len(text))),
        longest=max(map(len, visible), default=0),
    )


@dataclass(frozen=True, slots=True)
class TypedTokens:
    """Marks what looks like a special token in words, and finds it again in the prompt."""

    special: SpecialTexts
    opening: str = field(default_factory=new_mark)
    closing: str = field(default_factory=new_mark)

    def marked(self, message: Mapping[str, object]) -> Message:
        """The message with marks in every text but those that templates compare: role and type."""
        return {self._marked_text(name): self._marked(item, name) for name, item in message.items()}

    def _marked(self, value: object, key: str = "") -> object:
        if isinstance(value, str):
            return value if key in ("role", "type") else self._marked_text(value)
        if isinstance(value, dict):
            return self.marked(value)
        return [self._marked(item) for item in value] if isinstance(value, list) else value

    def _marked_text(self, text: str) -> str:
        pieces, end = [], 0
        for start, stop in self.special.places(text):
            pieces += [text[end:start], self.opening, text[start:stop], self.closing]
            end = stop
        return "".join((*pieces, text[end:])) if pieces else text

    def spans(self, prompt: str, marked: str) -> tuple[Span, ...]:
        """The prompt, cut at what people typed, as the render with marks tells.

        A typed text is plain only while both marks still enclose it: a template that cuts messages into pieces (at
        "</think>", say) may have torn them apart.
        """
        places = list(self.special.pattern.finditer(prompt))
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
        enclosed = f"{self.opening}((?:(?!{self.opening}|{self.closing}).)*){self.closing}"
        ends = [0]  # These are ends of the text outside marks, inside, outside and so on.
        pieces = re.split(enclosed, marked, flags=re.DOTALL)
        pieces = [piece.replace(self.opening, "").replace(self.closing, "") for piece in pieces]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        told = [(match[0], _overlaps(match.span(), ends)) for match in self.special.pattern.finditer("".join(pieces))]
        typed_texts = {text for text, is_typed in told if is_typed}
        typed = [text in typed_texts for text in texts]
        for start, start_told, length in _same_runs(texts, [text for text, _ in told]):
            typed[start : start + length] = [is_typed for _, is_typed in told[start_told : start_told + length]]
        return typed


def _same_runs(one: Sequence[str], other: Sequence[str]) -> list[tuple[int, int, int]]:
    """Runs of texts that both have, in order: where they start in each, and how long they are.

    The two are mostly equal but for some in the middle, which are compared one by one only while they are few.
    """
    num_first = _num_same(one, other)
    num_last = _num_same(one[num_first:][::-1], other[num_first:][::-1])
    end, other_end = len(one) - num_last, len(other) - num_last
    runs = [(0, 0, num_first), (end, other_end, num_last)]
    middle, other_middle = one[num_first:end], other[num_first:other_end]
    if len(middle) * len(other_middle) <= MOST_COMPARED:
        blocks = SequenceMatcher(None, middle, other_middle, autojunk=False).get_matching_blocks()
        runs += [(num_first + a, num_first + b, length) for a, b, length in blocks]
    return runs


def _num_same(one: Sequence[str], other: Sequence[str]) -> int:
    """How many texts both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _overlaps(span: tuple[int, int], ends: Sequence[int]) -> bool:
    """Whether some of the text from `span[0]` to `span[1]` lies inside marks."""
    first, last = bisect_right(ends, span[0]), bisect_left(ends, span[1])  # Pieces are counted from 1.
    return first < last or first % 2 == 0
