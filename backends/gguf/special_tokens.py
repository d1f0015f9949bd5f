"""Cuts the texts of special tokens out of a text once, in time that grows with its length.

llama.cpp goes through a text once for each special token, the longest texts first, and cuts each place out where it
still finds one; with many places its own way of it takes time that grows with their square. Here one search finds what
stands where. Where two places overlap and the later one belongs to the token that llama.cpp looks for first, that
stretch of the text alone is gone through as llama.cpp does it. Source: tokenizer_st_partition of llama-vocab.cpp.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import groupby

_MOST_BRANCHES = 64  # So many are nested in the pattern; texts that have more in common stand side by side.
_MOST_COMPARED = 64


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """strips_left, strips_right: the token takes in the blanks beside it."""

    token_id: int
    text: bytes
    strips_left: bool = False
    strips_right: bool = False


Precedes = Callable[[SpecialToken, SpecialToken, bytes], bool | None]


class SpecialTokens:
    """What is to be cut out. Safe to call from any thread."""

    def __init__(self, tokens: Iterable[SpecialToken], precedes: Precedes) -> None:
        """precedes: whether, of two texts of one length, the first is looked for before the second.

        Its third argument is a text that begins with the first and ends with the second, where they overlap or take in
        each other's blanks. None: a longer text stands there.
        """
        self._by_text = {token.text: token for token in tokens if token.text}
        self._precedes = precedes
        self._known: dict[tuple[bytes, bytes], bool | None] = {}  # It has answers of `precedes`.
        self.strips_any = any(token.strips_left or token.strips_right for token in self._by_text.values())
        texts = sorted(self._by_text)
        self._alone = frozenset(text for text in texts if _stands_alone(text, texts))
        self._pattern = re.compile(_either(texts, 0), re.DOTALL) if texts else None

    def parts(self, raw: bytes) -> Iterator[bytes | int]:
        """The text's parts between special tokens, and the ids of those, in order. No part is empty."""
        if self._pattern is None:
            places: Iterator[tuple[int, int, int]] = iter(())
        elif self.strips_any:
            present = [token for text, token in self._by_text.items() if text in raw]
            places = self._passes(raw, 0, len(raw), present)
        else:
            places = self._places(raw, self._pattern)
        end = 0
        for start, stop, token_id in places:
            if start > end:
                yield raw[end:start]
            yield token_id
            end = stop
        if end < len(raw):
            yield raw[end:]

    def _places(self, raw: bytes, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, int, int]]:
        """Start, end and id of what is cut out, in order."""
        at: int | None = 0
        while at is not None:
            matches, at = pattern.finditer(raw, at), None
            for match in matches:
                text = match[0]
                if text in self._alone or not self._is_overlapped(raw, match, pattern):
                    yield match.start(), match.end(), self._by_text[text].token_id
                else:
                    at, texts = self._cluster(raw, match, pattern)
                    yield from self._passes(raw, match.start(), at, [self._by_text[text] for text in texts])
                    break

    def _is_overlapped(self, raw: bytes, match: re.Match[bytes], pattern: re.Pattern[bytes]) -> bool:
        """Whether a text that may be looked for before this one begins inside it and goes on behind it."""
        start, end = match.span()
        other = pattern.search(raw, start + 1)
        while other is not None and other.start() < end:
            if other.end() > end and len(other[0]) >= end - start and other[0] != match[0]:
                return True
            other = pattern.search(raw, other.start() + 1)
        return False

    def _cluster(self, raw: bytes, match: re.Match[bytes], pattern: re.Pattern[bytes]) -> tuple[int, set[bytes]]:
        """The end of the stretch of overlapping places that begins here, and the texts in it."""
        end, texts = match.end(), set[bytes]()
        other: re.Match[bytes] | None = match
        while other is not None and other.start() < end:
            end = max(end, other.end())
            longest = other[0]
            if longest not in texts:
                texts.update(longest[:size] for size in range(1, len(longest) + 1) if longest[:size] in self._by_text)
            other = pattern.search(raw, other.start() + 1)
        return end, texts

    def _passes(
        self, raw: bytes, start: int, end: int, tokens: Iterable[SpecialToken]
    ) -> Iterator[tuple[int, int, int]]:
        """What is cut out between two places, as llama.cpp finds it: one token after another."""
        found: list[tuple[int, int, int]] = []
        parts = [(start, end)]
        for token in self._in_order(tokens):
            before, parts = parts, []
            for part in before:
                at, last = part
                for place in _find(raw, at, last, token):
                    parts.append((at, place[0]))
                    found.append(place)
                    at = place[1]
                parts.append((at, last))
        return iter(sorted(found))

    def _in_order(self, tokens: Iterable[SpecialToken]) -> Iterator[SpecialToken]:
        """In the order in which llama.cpp looks for them, as far as it matters."""
        by_length = sorted(tokens, key=lambda token: (-len(token.text), token.text))
        for _, group in groupby(by_length, key=lambda token: len(token.text)):
            equals = list(group)
            order: TopologicalSorter[SpecialToken] = TopologicalSorter(dict.fromkeys(equals, ()))
            for one, other, joined in _meeting(equals):
                key = one.text, joined
                if key not in self._known:
                    self._known[key] = self._precedes(one, other, joined)
                is_before = self._known[key]
                if is_before is not None:
                    order.add(*((other, one) if is_before else (one, other)))
            yield from order.static_order()


def _meeting(tokens: Sequence[SpecialToken]) -> Iterator[tuple[SpecialToken, SpecialToken, bytes]]:
    """Pairs of tokens, whose texts are sorted, of which the one may take away what the other needs, and where it does:
    a text that the first begins and the second ends.
    """
    texts = [token.text for token in tokens]
    for token in tokens:
        for start in range(1, len(token.text) + 1):
            tail = token.text[start:]
            for place in range(bisect_left(texts, tail), len(texts)):
                other = tokens[place]
                if not other.text.startswith(tail):
                    break
                if other is not token and (tail or _takes_from(token, other)):
                    yield token, other, token.text + other.text[len(tail) :]


def _takes_from(left: SpecialToken, right: SpecialToken) -> bool:
    """Whether, of two tokens side by side, one takes in blanks of the other."""
    return (left.strips_right and right.text[:1].isspace()) or (right.strips_left and left.text[-1:].isspace())


def _find(raw: bytes, at: int, end: int, token: SpecialToken) -> Iterator[tuple[int, int, int]]:
    """Where a token stands between two places, with the blanks that it takes in."""
    while (found := raw.find(token.text, at, end)) >= 0:
        start, stop = found, found + len(token.text)
        while token.strips_left and start > at and raw[start - 1 : start].isspace():
            start -= 1
        while token.strips_right and stop < end and raw[stop : stop + 1].isspace():
            stop += 1
        yield start, stop, token.token_id
        at = stop


def _stands_alone(text: bytes, texts: Sequence[bytes]) -> bool:
    """Whether no text that may be looked for before this one can begin inside it and go on behind it.

    texts: all, sorted. False where that would take long to tell.
    """
    if len(text) > _MOST_COMPARED:
        return False
    for start in range(1, len(text)):
        tail = text[start:]
        first = bisect_left(texts, tail)
        for place in range(first, min(first + _MOST_COMPARED, len(texts))):
            other = texts[place]
            if not other.startswith(tail):
                break
            if len(other) >= len(text) and other != text:
                return False
        else:
            if first + _MOST_COMPARED < len(texts):
                return False
    return True


def _either(texts: Sequence[bytes], depth: int) -> bytes:
    """A pattern of the longest of these sorted texts that stands somewhere."""
    if depth > _MOST_BRANCHES:
        return b"(?:" + b"|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + b")"
    branches, start = [], 0
    is_optional = texts[0] == b""
    start = int(is_optional)
    while start < len(texts):
        stop = next((i for i in range(start, len(texts)) if texts[i][0] != texts[start][0]), len(texts))
        first, last = texts[start], texts[stop - 1]
        size = next(
            (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )
        rest = [text[size:] for text in texts[start:stop]]
        branches.append(re.escape(first[:size]) + (b"" if rest == [b""] else _either(rest, depth + 1)))
        start = stop
    return b"(?:" + b"|".join(branches) + b")" + (b"?" if is_optional else b"")
