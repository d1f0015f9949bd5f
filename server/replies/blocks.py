"""An answer as a row of blocks: a thought, a text or a call, each whole before the next begins.

Dialects that number the parts of an answer (OpenAI's Responses, Anthropic's Messages) write one event or more for each
step. A text of blanks alone, as models write in front of a call, is no block.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tightrope.engine.types import Token
from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, CallInput, Content, Event, Thought
from tightrope.server.replies.form import ReplyPlan

Kind = Literal["thought", "text", "call"]


@dataclass(slots=True)
class Block:
    """One part of an answer, as far as it has come: `text` is that of a call's arguments or input, too."""

    index: int
    kind: Kind
    text: str = ""
    call_id: str = ""
    name: str = ""
    is_custom: bool = False  # The call has an input.
    tokens: list[Token] = field(default_factory=list)  # Those of a text.


@dataclass(frozen=True, slots=True)
class Opened:
    """A block begins."""

    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """A block has gained some text, of these tokens where it is one of text."""

    block: Block
    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """A block is whole, or the answer ends in it."""

    block: Block


Step = Opened | Grown | Closed


class BlockReader:
    """Reads one answer into blocks."""

    def __init__(self, plan: ReplyPlan) -> None:
        self.blocks: list[Block] = []
        self.num_thought_tokens = 0
        self._reader = plan.reader()
        self._open: Block | None = None
        self._blanks = ""  # They may yet begin a text.
        self._pending: list[Token] = []  # No text of theirs has come out yet.
        self._num_new = 0  # So many tokens have come since the last event.

    @property
    def num_calls(self) -> int:
        return sum(block.kind == "call" for block in self.blocks)

    def feed(self, text: str, tokens: Sequence[Token] = ()) -> list[Step]:
        """What is certain with some more text, and the tokens that it came with."""
        self._pending += tokens
        self._num_new += len(tokens)
        if self._reader is not None:
            return list(self._steps(self._reader.feed(text)))
        return list(self._steps([Content(text)] if text else []))

    def finish(self, *, is_cut: bool) -> list[Step]:
        """The rest, when no more text comes; is_cut: the model had more to say."""
        steps = [] if self._reader is None else list(self._steps(self._reader.finish(is_cut=is_cut)))
        if self._open is not None:
            steps.append(Closed(self._open))
        return steps

    def _steps(self, events: Iterable[Event]) -> Iterator[Step]:
        for event in events:
            self.num_thought_tokens += self._num_new if isinstance(event, Thought) else 0
            self._num_new = 0
            match event:
                case Thought(text):
                    yield from self._grow("thought", text)
                case Content(text):
                    yield from self._add_content(text)
                case CallBegin(_, call_id, name, is_custom):
                    self._blanks = ""
                    yield from self._begin(Block(len(self.blocks), "call", "", call_id, name, is_custom))
                case CallArguments(_, text) | CallInput(_, text):
                    yield from self._grow("call", text)
                case CallEnd():
                    pass

    def _add_content(self, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != "text":
            text, self._blanks = self._blanks + text, ""
            if not text.strip():
                self._blanks = text
                return
        yield from self._grow("text", text)

    def _grow(self, kind: Kind, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(len(self.blocks), kind))
        block = self.blocks[-1]
        block.text += text
        tokens: list[Token] = []
        if kind == "text":
            tokens, self._pending = _last_tokens(self._pending, len(text)), []
            block.tokens += tokens
        yield Grown(block, text, tokens)

    def _begin(self, block: Block) -> Iterator[Step]:
        if self._open is not None:
            yield Closed(self._open)
        self._open = block
        self.blocks.append(block)
        yield Opened(block)


def _last_tokens(tokens: Sequence[Token], length: int) -> list[Token]:
    """Those at the end that a text of this length is made of: before them there are marks, or text of another kind."""
    start = len(tokens)
    while start and length > 0:
        start -= 1
        length -= len(tokens[start].text)
    return list(tokens[start:])
