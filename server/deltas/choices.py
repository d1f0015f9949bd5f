"""Whole answers, put together from their deltas."""

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from tightrope.engine.types import Finish, PromptInfo, Timings, Token
from tightrope.server.deltas.side_by_side import Deltas

_UNREAD = PromptInfo(num_tokens=0, num_cached=0, seed=0)


@dataclass(slots=True)
class Choice:
    """One whole answer. One that was aborted counts as ended where it was."""

    prompt: PromptInfo
    text: str
    tokens: list[Token]
    finish: Finish

    def pieces(self) -> Iterator[tuple[str, list[Token]]]:
        """The text token by token, and what no token has; a stop string has cut the texts of the last ones."""
        rest = self.text
        for token in self.tokens:
            piece, rest = rest[: len(token.text)], rest[len(token.text) :]
            yield piece, [token]
        yield rest, []

    def mean_logprob(self) -> float:
        """By which the best of several answers is found."""
        logprobs = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


@dataclass(slots=True)
class _Growing:
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    prompt: PromptInfo = _UNREAD
    finish: Finish | None = None

    def whole(self) -> Choice:
        finish = self.finish or Finish("eos", len(self.tokens), Timings(0, 0, 0))
        return Choice(self.prompt, "".join(self.texts), self.tokens, finish)


async def collect(deltas: Deltas, num_choices: int) -> list[Choice]:
    """All choices, whole, in the order of their numbers. Raises what the engine raises."""
    growing = [_Growing() for _ in range(num_choices)]
    async with aclosing(deltas):
        async for number, delta in deltas:
            choice = growing[number]
            choice.texts.append(delta.text)
            choice.tokens += delta.tokens
            if delta.prompt is not None:
                choice.prompt = delta.prompt
            if delta.finish is not None:
                choice.finish = delta.finish
    return [choice.whole() for choice in growing]
