"""Calls as a list of Python's: `[get_weather(city="Oslo", days=2)]`, as Llama 3.2 and 4 write them.

Source: Meta, "Llama 3.2 | Model Cards and Prompt formats", zero-shot function calling.
"""

import ast
import re
from dataclasses import dataclass

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.call_ids import CallId
from tightrope.server.replies.calls.form import MAX_CALLS, CallForm, CallReader, Functions, Schema, alternatives
from tightrope.server.replies.calls.values import as_json, named_properties, rooted
from tightrope.server.replies.events import Content
from tightrope.server.replies.lark import Spelling, literal
from tightrope.server.replies.reader import Steps

_START, _END = "<|python_start|>", "<|python_end|>"
_TOKEN = re.compile(r"""\\.|["'()\[\]{}]""", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class PythonicCalls(CallForm):
    """A list is the whole answer."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (_START, _END)

    def reader(self, functions: Functions, made_id: CallId) -> "PythonicReader":
        return PythonicReader(functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        bodies = [
            f'{literal(name + "(")} {_arguments(schema, is_compact=is_compact)} ")"'
            for name, schema in functions.items()
        ]
        more = "" if one_call else f' (", " call){{0,{MAX_CALLS - 1}}}'
        return f'calls: "[" call{more} "]"\n{alternatives("call", bodies)}'


PYTHONIC = PythonicCalls("")


def _arguments(schema: Schema, *, is_compact: bool) -> str:
    """Lark for arguments by name, in the order of the schema; what may be left out stands behind what may not."""
    parts = sorted(named_properties(schema), key=lambda part: not part[2])
    made = ""
    for number, (name, one, is_required) in enumerate(reversed(parts)):
        value = f"{literal(name + '=')} {lark_of_schema(rooted(one, schema), is_compact=is_compact)}"
        is_first = number == len(parts) - 1
        value = value if is_first else f'", " {value}'
        made = f"{value} {made}" if is_required else f"({value} {made})?"
    return made


class PythonicReader(CallReader):
    """Gives out each call when it is whole."""

    def read(self) -> Steps[None]:
        read = yield from self.take_blanks()
        read += (yield from self.take_if(_START)) or ""
        read += yield from self.take_blanks()
        if (yield from self.take_if("[")) is not None:
            read += "["
            is_list = True
            while is_list:
                read += yield from self.take_blanks()
                text, is_call = yield from self._call()
                read = "" if is_call else read + text
                if not is_call:
                    break
                yield from self.take_blanks()
                is_list = (yield from self.take_if(",", "]")) == ","
        if self.num_calls:
            yield from self.take_blanks()
            yield from self.take_if(_END)
            yield from self.take_blanks()
        if read and not (self.is_cut and not self.held):
            yield Content(read)
        yield from self.give_until(())

    def _call(self) -> Steps[tuple[str, bool]]:
        """What was read of a call, and whether it was one."""
        names = tuple(f"{name}(" for name in self.functions)
        head = yield from self.take_if(*names)
        if head is None:
            return "", False
        text, is_whole = yield from self._to_bracket()
        arguments = _read(text) if is_whole else None
        if arguments is None:
            return head + text, False
        yield from self.whole(head[:-1], arguments)
        return "", True

    def _to_bracket(self) -> Steps[tuple[str, bool]]:
        """The text up to the bracket that closes the call, which is taken as well."""
        place, depth, quote = 0, 1, ""
        while True:
            while (match := _TOKEN.search(self.held, place)) is not None:
                mark, place = match[0], match.end()
                if quote:
                    quote = "" if mark == quote else quote
                elif mark in "\"'":
                    quote = mark
                elif mark[0] != "\\":
                    depth += 1 if mark in "([{" else -1
                if depth == 0:
                    text, self.held = self.held[:place], self.held[place:]
                    return text, True
            place = len(self.held) - self.held.endswith("\\") if place < len(self.held) else place
            if self.is_end:
                text, self.held = self.held, ""
                return text, False
            yield None


def _read(text: str) -> str | None:
    """The arguments of a call, up to its last bracket, as JSON; None where they are no plain values by name."""
    try:
        call = ast.parse(f"f({text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
            return None
        return as_json({str(one.arg): ast.literal_eval(_Constants().visit(one.value)) for one in call.keywords})
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


class _Constants(ast.NodeTransformer):
    """JSON's names for constants become Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node
