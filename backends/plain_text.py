"""Text that must not be read as marks, for vocabularies that would find them in any text."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

# Words, headings such as "### Input:", rules and blanks, which models write in any text: no marks, even as tokens.
WORDS = re.compile(r"""[\w\s#:.,;!?*='"`()…—-]*""")
MOST_BRANCHES = 8  # A pattern holds so many inside each other.


def any_of(texts: Iterable[str], branches: int = MOST_BRANCHES) -> str:
    """A pattern that finds these texts, the longest where several begin.

    Vocabularies have a thousand marks that begin alike: what they share is looked for once, and not once for each.
    """
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        groups.setdefault(text[:1], []).append(text)
    ends_here = [""] if groups.pop("", None) and branches < MOST_BRANCHES else []
    found: list[str] = []
    for group in groups.values():
        pairs = enumerate(zip(min(group), max(group), strict=False))
        shared = group[0][: next((i for i, (a, b) in pairs if a != b), len(min(group)))]
        rests = sorted((text[len(shared) :] for text in group), key=len, reverse=True)
        rest = any_of(rests, branches - 1) if branches > 1 else "|".join(map(re.escape, rests))
        found.append(re.escape(shared) + (f"(?:{rest})" if len(rests) > 1 else ""))
    return "|".join(found + ends_here) or "(?!)"


class MarkCutter:
    """Cuts a text inside the marks that it holds."""

    def __init__(self, cuts: Mapping[str, int]) -> None:
        """cuts: behind how many of its characters each mark is cut; at least one, and not all."""
        self._cuts = cuts
        self._pattern = re.compile(any_of(cuts)) if cuts else None

    @property
    def cuts_any(self) -> bool:
        """Whether there are marks to be cut at all."""
        return self._pattern is not None

    def pieces(self, text: str) -> list[str]:
        """The text in pieces, one at least, none of which holds a whole mark."""
        if self._pattern is None:
            return [text]
        places = [match.start() + self._cuts[match[0]] for match in self._pattern.finditer(text)]
        if not places:
            return [text]
        parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
        return [piece for part in parts for piece in self.pieces(part)]  # Marks may overlap.


def place_to_cut(mark: str, token_id: int, encode: Callable[[str], Sequence[int]]) -> int | None:
    """Behind how many characters a mark is cut, so that its pieces are tokenized as its text would be.

    That is where a token of plain text ends, so that no place gives fewer tokens. None if the vocabulary doesn't find
    the mark in plain text, and if no cut keeps it from that.
    """
    if token_id not in encode(mark):
        return None
    found: dict[int, int] = {}
    for place in range(1, len(mark)):
        token_ids = [*encode(mark[:place]), *encode(mark[place:])]
        if token_id not in token_ids:
            found[place] = len(token_ids)
    return min(found, key=found.__getitem__, default=None)
