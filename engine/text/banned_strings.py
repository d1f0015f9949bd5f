"""Texts that an answer must not hold: tokens that may become part of one are held back, and taken back if they do."""

from collections.abc import Sequence
from dataclasses import dataclass

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.limits import MAX_BANNED_CHARS, MAX_BANNED_STRINGS
from tightrope.engine.text.detokenizer import Detokenizer
from tightrope.engine.types import Token

MAX_TRIES = 256  # After so many other ways the answer ends, and TRIES_PER_TOKEN more for each token given out.
TRIES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class PendingToken:
    """A token that isn't given out yet, the text that it lets be shown, and how the text stood before it."""

    token: Token
    shown: str
    before: Detokenizer


class BannedStrings:
    """The end of one answer, as far as it may belong to a banned string. Upper and lower case are the same."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises InvalidRequest for too many strings, and for strings that are empty or too long."""
        if len(strings) > MAX_BANNED_STRINGS:
            raise InvalidRequest(
                f"banned_strings: at most {MAX_BANNED_STRINGS} strings, not {len(strings)}", "banned_strings"
            )
        for string in strings:
            if not 0 < len(string) <= MAX_BANNED_CHARS:
                raise InvalidRequest(
                    f"banned_strings: from 1 to {MAX_BANNED_CHARS} characters each, not {len(string)}", "banned_strings"
                )
        self._strings = frozenset(map(_fold, strings))
        self._lengths = sorted({len(string) for string in self._strings})
        self._beginnings = frozenset(string[:n] for string in self._strings for n in range(1, len(string)))
        self._held: list[PendingToken] = []
        self._starts: list[int] = []  # Each of the held tokens starts there in their text.
        self._text = ""
        self._given = ""  # It is the end of the text before theirs, as far as a banned string may begin there.
        self._excluded: dict[int, set[int]] = {}  # By place in the output it has ids that began a banned string there.
        self._num_given = 0  # It is the place in the output of the first token that is held.
        self._num_tries = 0

    @property
    def is_stuck(self) -> bool:
        """Whether so many ways on were tried that the next won't be better."""
        return self._num_tries >= MAX_TRIES + TRIES_PER_TOKEN * self._num_given

    def excluded_at(self, place: int) -> tuple[int, ...]:
        """Token ids that may not come as the output's token number `place`."""
        return tuple(self._excluded.get(place, ()))

    def feed(self, held: PendingToken) -> int | None:
        """Hold a token. How many tokens must be taken back because of a banned string; None if there is none.

        The first of them is the one that began the string. Where that one was given out already, because the text went
        on in another way at first, it is the first that wasn't.
        """
        self._held.append(held)
        self._starts.append(len(self._text))
        old = len(self._text)
        self._text += _fold(held.token.text)
        begun = self._first_banned(old)
        if begun is None:
            return None
        return len(self._held) - self._index_of(begun)

    def take_back(self, num_tokens: int) -> PendingToken:
        """Forget the last tokens; the first of them, which comes back, may not come again where it came."""
        first, place = self._held[-num_tokens], self._num_given + len(self._held) - num_tokens
        self._text = self._text[: self._starts[-num_tokens]]
        del self._held[-num_tokens:], self._starts[-num_tokens:]
        self._excluded = {p: ids for p, ids in self._excluded.items() if p <= place}
        self._excluded.setdefault(place, set()).add(first.token.token_id)
        self._num_tries += 1
        return first

    def release(self) -> list[PendingToken]:
        """The tokens that no banned string can begin in any more."""
        possible = next((i for i in range(len(self._text)) if self._text[i:] in self._beginnings), len(self._text))
        count = len(self._held)
        if possible < len(self._text):
            count = self._index_of(possible)
        return self._give_out(count)

    def release_all(self) -> list[PendingToken]:
        """All tokens: the answer ends here."""
        return self._give_out(len(self._held))

    def _give_out(self, count: int) -> list[PendingToken]:
        if count == 0:
            return []
        given, self._held = self._held[:count], self._held[count:]
        cut = self._starts[count] if count < len(self._starts) else len(self._text)
        self._given = (self._given + self._text[:cut])[-self._lengths[-1] :]
        self._text, self._starts = self._text[cut:], [start - cut for start in self._starts[count:]]
        self._num_given += count
        self._excluded = {place: ids for place, ids in self._excluded.items() if place >= self._num_given}
        return given

    def _index_of(self, place: int) -> int:
        """The held token that adds the character at this place of their text; the first that adds any, before it."""
        adding = [i for i, held in enumerate(self._held) if held.token.text]
        return max((i for i in adding if self._starts[i] <= place), default=adding[0])

    def _first_banned(self, old: int) -> int | None:
        """Where the first string begins of those that end behind the held text's first `old` characters.

        Negative: so many characters before the held text.
        """
        window = self._given + self._text
        starts = [
            end - length
            for end in range(len(self._given) + old + 1, len(window) + 1)
            for length in self._lengths
            if length <= end and window[end - length : end] in self._strings
        ]
        return min(starts) - len(self._given) if starts else None


def _fold(text: str) -> str:
    """Lower case, character by character, so that lengths stay."""
    return "".join(small if len(small := character.lower()) == 1 else character for character in text)
