"""Texts that no repetition reaches across: where in a sequence of tokens one of them ends."""

from collections.abc import Callable, Sequence

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.limits import MAX_BREAKER_BYTES


class Breakers:
    """A set of texts, looked up by their lengths: the cost of a token doesn't grow with their number."""

    def __init__(self, texts: Sequence[str], token_bytes: Callable[[int], bytes]) -> None:
        """token_bytes: the bytes that a token adds to the text. Raises InvalidRequest for longer texts."""
        self._texts = frozenset(text.encode() for text in texts if text)
        self._lengths = sorted({len(text) for text in self._texts})
        if self._lengths and self._lengths[-1] > MAX_BREAKER_BYTES:
            raise InvalidRequest(
                f"dry_sequence_breakers: at most {MAX_BREAKER_BYTES} bytes each, not {self._lengths[-1]}",
                "dry_sequence_breakers",
            )
        self._token_bytes = token_bytes

    def ends_in(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token completes a breaker, alone or together with tokens before it."""
        if not self._lengths:
            return False
        last = self._token_bytes(token_ids[-1])
        text, start = last, len(token_ids) - 1
        while start > 0 and len(text) - len(last) < self._lengths[-1] - 1:
            start -= 1
            text = self._token_bytes(token_ids[start]) + text
        for end in range(len(text) - len(last) + 1, len(text) + 1):
            for length in self._lengths:
                if length > end:
                    break
                if text[end - length : end] in self._texts:
                    return True
        return False
