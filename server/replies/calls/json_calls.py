"""Calls that are JSON objects of a name and arguments, between marks or bare, alone or in a list.

Sources: Nous Research, "Hermes Function Calling" (`<tool_call>`); Meta, "Llama 3.1 model card" (bare, or behind
`<|python_tag|>`); Mistral's tokenizer up to v7 (`[TOOL_CALLS] [...]`); Fireworks, "FireFunction" (`functools[...]`);
Microsoft's Phi-4-mini and IBM's Granite (`<|tool_call|>`); Cohere's Command (`<|START_ACTION|>`).
"""

from dataclasses import dataclass

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.call_ids import CallId
from tightrope.server.replies.calls.form import (
    MAX_CALLS,
    CallForm,
    Functions,
    alternatives,
    arguments_schema,
    name_in_quotes,
)
from tightrope.server.replies.calls.json_reader import JsonReader
from tightrope.server.replies.events import Content
from tightrope.server.replies.lark import Spelling, literal
from tightrope.server.replies.reader import Steps


@dataclass(frozen=True, slots=True)
class JsonCalls(CallForm):
    """Objects between an opening and a closing mark; without marks they are the whole answer."""

    closing: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    is_list: bool = False  # A list is forced; both are read.
    also_opening: str = ""  # Some answers begin with this one, where there is no opening.

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.opening, self.closing, self.also_opening)))

    @property
    def stop(self) -> str:
        return self.closing

    def reader(self, functions: Functions, made_id: CallId) -> JsonReader:
        return JsonCallReader(self, functions, made_id) if self.opening else BareReader(self, functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        bodies = [
            f'"{{{_key(self.name_key)}: {name_in_quotes(name)}, {_key(self.arguments_key)}: " '
            f'{lark_of_schema(arguments_schema(schema), is_compact=is_compact)} "}}"'
            for name, schema in functions.items()
        ]
        call = alternatives("call", bodies)
        if self.is_list:
            closing = spelling.of(self.closing) if self.closing else ""
            more = "" if one_call else f' (", " call){{0,{MAX_CALLS - 1}}}'
            return f'calls: "[" call{more} "]" {closing}\n{call}'
        if not self.opening:
            return f"calls: call\n{call}"
        again = f"{spelling.of(chr(10) + self.opening + chr(10))} call {spelling.of(chr(10) + self.closing)}"
        more = "" if one_call else f" ({again}){{0,{MAX_CALLS - 1}}}"
        return f'calls: "\\n" call {spelling.of(chr(10) + self.closing)}{more}\n{call}'


def _key(key: str) -> str:
    return literal(literal(key))[1:-1]


class JsonCallReader(JsonReader):
    """Objects, or lists of them, behind an opening mark."""

    def __init__(self, form: JsonCalls, functions: Functions, made_id: CallId) -> None:
        self._form = form
        super().__init__(functions, made_id)

    def read(self) -> Steps[None]:
        while (opening := (yield from self.give_until([self._form.opening]))) is not None:
            num_before = self.num_calls
            yield from self.calls(opening)
            if self.num_calls > num_before:
                yield from self.take_blanks()

    def calls(self, read: str) -> Steps[None]:
        """Read what stands behind an opening; what is no call is content, with the mark."""
        read += yield from self.take_blanks()
        is_list = (yield from self.take_if("[")) is not None
        if is_list:
            read += "[" + (yield from self.take_blanks())
        text = yield from self.call_of_object()
        while is_list and text is None and (yield from self._another()):
            read, text = "", (yield from self.call_of_object())
        if not self._form.closing:
            rest, mark = "", None
        elif text is None:  # The next call begins another one where this one isn't closed.
            rest, mark = yield from self.take_until(self._form.closing, self._form.opening)
            if mark == self._form.opening:
                self.held = mark + self.held
        elif not is_list:
            rest, mark = yield from self.take_until(self._form.closing)
        else:
            rest, mark = "", None
        is_half = self.is_cut and not self.held and mark is None
        if text is not None and not is_half:
            yield Content(read + text + rest + (mark or ""))

    def _another(self) -> Steps[bool]:
        """Whether the list goes on; read what stands between two of its objects."""
        yield from self.take_blanks()
        if (yield from self.take_if(",", "]")) != ",":
            return False
        yield from self.take_blanks()
        return True


class BareReader(JsonReader):
    """Objects at the beginning of an answer, one behind the other."""

    def __init__(self, form: JsonCalls, functions: Functions, made_id: CallId) -> None:
        self._form = form
        super().__init__(functions, made_id)

    def read(self) -> Steps[None]:
        read = yield from self.take_blanks()
        if self._form.also_opening:
            read += (yield from self.take_if(self._form.also_opening)) or ""
            read += yield from self.take_blanks()
        while (text := (yield from self.call_of_object())) is None:
            yield from self.take_blanks()
            if (yield from self.take_if(";", ",")) is not None:
                yield from self.take_blanks()
            read = ""
        is_half = self.is_cut and not self.held
        if not is_half and read + text:
            yield Content(read + text)
        yield from self.give_until(())
