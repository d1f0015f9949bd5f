"""Streams in which each piece of text comes with its own token, for clients that show probabilities beside it."""

from collections import deque
from contextlib import aclosing

import msgspec

from tightrope.engine.types import Delta, Token
from tightrope.server.deltas.side_by_side import Deltas


class _Line:
    """One choice's tokens and text on their way out; text may lag behind while it can still become a stop string."""

    def __init__(self) -> None:
        self._tokens: deque[Token] = deque()
        self._text = ""

    def feed(self, delta: Delta) -> list[Delta]:
        self._tokens += delta.tokens
        self._text += delta.text
        out: list[Delta] = []
        while self._tokens and len(self._tokens[0].text) <= len(self._text):
            out.append(self._next(delta, len(self._tokens[0].text)))
        if delta.finish is None:
            return out
        while self._tokens:  # A stop string has cut these.
            out.append(self._next(delta, len(self._text)))
        last = msgspec.structs.replace(delta, text=self._text, tokens=(), prompt=None)
        return [*out, last]

    def _next(self, delta: Delta, length: int) -> Delta:
        text, self._text = self._text[:length], self._text[length:]
        return Delta(delta.request_id, delta.index, text, (self._tokens.popleft(),))


async def one_token_each(deltas: Deltas) -> Deltas:
    """The deltas cut so that each has at most one token, and with it that token's own text.

    The prompt comes with the first delta of a choice, the finish with one of its own. Closing it closes `deltas`.
    """
    lines: dict[int, _Line] = {}
    async with aclosing(deltas):
        async for number, delta in deltas:
            if delta.read is not None:
                yield number, delta
                continue
            cut = lines.setdefault(number, _Line()).feed(delta)
            if delta.prompt is not None:
                first = cut[0] if cut else Delta(delta.request_id, delta.index, "", ())
                cut[:1] = [msgspec.structs.replace(first, prompt=delta.prompt)]
            for piece in cut:
                yield number, piece
