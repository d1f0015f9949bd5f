"""What a family of call formats is: a reader, and a grammar in which a call is forced."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightrope.server.replies.call_ids import CallId, long_id
from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, Event
from tightrope.server.replies.lark import REST, Spelling, literal, quoted
from tightrope.server.replies.reader import Reader, Steps

ANY = {"type": "object", "additionalProperties": True}  # Arguments of any kind.
MAX_CALLS = 16  # One answer is forced to so many at most.

Schema = Mapping[str, Any]  # It is a JSON schema.
Functions = Mapping[str, Schema]  # By name, those that may be called, with the schemas of their arguments.


class CallReader(Reader):
    """Reads the calls of one answer; all else is content."""

    def __init__(self, functions: Functions, made_id: CallId = long_id) -> None:
        self.functions, self._made_id = functions, made_id
        self.num_calls = 0
        super().__init__()

    def begin(self, name: str) -> CallBegin:
        """The next call. Its arguments and its end follow, by `argue` and `end`."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        return CallBegin(index, self._made_id(name, index), name)

    def argue(self, text: str) -> Event:
        """A piece of the arguments of the call that has begun."""
        return CallArguments(self.num_calls - 1, text)

    def end(self) -> Event:
        """The call that has begun is over."""
        return CallEnd(self.num_calls - 1)

    def whole(self, name: str, arguments: str) -> Steps[None]:
        """A call that is known whole."""
        yield self.begin(name)
        yield self.argue(arguments)
        yield self.end()


@dataclass(frozen=True, slots=True)
class CallForm(ABC):
    """How one family writes calls."""

    opening: str  # A call begins with this text; the empty one is a call that is the whole answer.

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts of tokens that calls are told by, be they special or not."""
        return tuple(filter(None, (self.opening,)))

    @property
    def made_id(self) -> CallId:
        """How ids of calls are made."""
        return long_id

    @property
    def stop(self) -> str:
        """Behind this text nothing follows in an answer that may hold one call; the empty one is none."""
        return ""

    @abstractmethod
    def reader(self, functions: Functions, made_id: CallId) -> Reader:
        """Reads the calls of one answer; made_id: its template may want other ids than the family."""

    @abstractmethod
    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        """Lark for the rule `calls`: all from behind the opening to the end of the last call.

        is_compact: JSON has no white space. Raises InvalidRequest.
        """

    def forced(self, functions: Functions, spelling: Spelling, *, one_call: bool) -> str:
        """Lark for one call of these functions, or several, and nothing besides. Raises InvalidRequest."""
        opening = spelling.of(self.opening) if self.opening else ""
        return f"start: {opening} calls\n{self.rules(functions, spelling, one_call=one_call, is_compact=True)}"

    def free(self, functions: Functions, spelling: Spelling, *, one_call: bool) -> str:
        """Lark for any text, in which what begins like a call is one. Raises InvalidRequest."""
        rules = self.rules(functions, spelling, one_call=one_call, is_compact=False)
        if not self.opening:
            return rf"start: calls | FREE{chr(10)}FREE: /([^\s{{\[](?s:.*))?/{chr(10)}{rules}"
        if spelling.is_token(self.opening):
            return f"start: TEXT ({spelling.of(self.opening)} calls TEXT)*\nTEXT: {REST}\n{rules}"
        before, mark = spelling.parted(self.opening)
        if mark:
            start = f"start: (OPENED {spelling.of(mark)} calls)* FREE"
            return f"{start}\nOPENED: /(?s:.*){quoted(before)}/\nFREE: {REST}\n{rules}"
        opening = quoted(self.opening)
        free = f"FREE: {REST} & ~/(?s:.*){opening}(?s:.*)/"
        return f"start: (opened calls)* FREE\nopened[lazy]: /(?s:.*){opening}/\n{free}\n{rules}"


def arguments_schema(schema: Schema) -> Schema:
    """The schema of a function's arguments: one that names none takes none."""
    if schema.keys() <= {"type", "properties"} and not schema.get("properties"):
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema}


def alternatives(rule: str, bodies: list[str]) -> str:
    """Lark for a rule that is one of several, each a rule of its own."""
    names = [f"{rule}{number}" for number in range(len(bodies))]
    lines = [f"{name}: {body}" for name, body in zip(names, bodies, strict=True)]
    return "\n".join([f"{rule}: {' | '.join(names)}", *lines])


def name_in_quotes(name: str) -> str:
    """A function's name as JSON, inside a literal of Lark."""
    return literal(literal(name))[1:-1]
