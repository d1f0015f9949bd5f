"""What an answer is made of, in the order in which it is written: the same for every family of models and dialect.

Pieces of one kind that follow each other are one text. A call begins, has a JSON object as its arguments, in pieces,
and ends; nothing else comes in between. However the model's text is cut, the joined pieces are the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of what the reader is told."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks before."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A function is called. `index` counts the calls of an answer from 0."""

    index: int
    call_id: str
    name: str
    is_custom: bool = False  # It is called with a text, which comes as CallInput.


@dataclass(frozen=True, slots=True)
class CallInput:
    """A piece of the text that a custom tool is called with."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is over: the arguments are whole, unless the answer was cut."""

    index: int


Event = Content | Thought | CallBegin | CallArguments | CallInput | CallEnd


@dataclass(slots=True)
class Call:
    """One call, as far as it came. arguments: JSON text, or the input of a custom tool."""

    call_id: str
    name: str
    arguments: str = ""
    is_custom: bool = False


@dataclass(slots=True)
class Reply:
    """A whole answer, put together from its events."""

    content: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Reply":
        """The answer that these events make."""
        made = cls()
        for event in events:
            match event:
                case Content(text):
                    made.content += text
                case Thought(text):
                    made.thought += text
                case CallBegin(_, call_id, name, is_custom):
                    made.calls.append(Call(call_id, name, is_custom=is_custom))
                case CallArguments(index, text) | CallInput(index, text):
                    made.calls[index].arguments += text
                case CallEnd():
                    pass
        return made
