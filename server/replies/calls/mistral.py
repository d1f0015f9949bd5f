"""Mistral's calls, behind `[TOOL_CALLS]`: a list of objects, or since 2025 a name, `[ARGS]` and the arguments.

Source: mistral-common, the tokenizers v3 to v13.
"""

from dataclasses import dataclass

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.call_ids import CallId, short_id
from tightrope.server.replies.calls.form import MAX_CALLS, Functions, alternatives, arguments_schema
from tightrope.server.replies.calls.json_calls import JsonCallReader, JsonCalls
from tightrope.server.replies.events import Content
from tightrope.server.replies.lark import Spelling, literal
from tightrope.server.replies.reader import Steps

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


@dataclass(frozen=True, slots=True)
class MistralCalls(JsonCalls):
    """Both forms are read; the newer one is forced if `is_named`."""

    is_named: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (_CALLS, _ID, _ARGUMENTS)

    @property
    def made_id(self) -> CallId:
        return short_id

    def reader(self, functions: Functions, made_id: CallId) -> "MistralReader":
        return MistralReader(self, functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        if not self.is_named:
            return JsonCalls.rules(self, functions, spelling, one_call=one_call, is_compact=is_compact)
        bodies = [
            f"{literal(name)} {spelling.of(_ARGUMENTS)} "
            f"{lark_of_schema(arguments_schema(schema), is_compact=is_compact)}"
            for name, schema in functions.items()
        ]
        more = "" if one_call else f" ({spelling.of(_CALLS)} call){{0,{MAX_CALLS - 1}}}"
        return f"calls: call{more}\n{alternatives('call', bodies)}"


LISTED = MistralCalls(_CALLS, is_list=True)
NAMED = MistralCalls(_CALLS, is_named=True)


class MistralReader(JsonCallReader):
    """Tells the two forms by what stands behind the mark."""

    def calls(self, read: str) -> Steps[None]:
        read += yield from self.take_blanks()
        if self.held[:1] in ("[", "{", ""):
            yield from JsonCallReader.calls(self, read)
            return
        name, mark = yield from self.take_until(_ID, _ARGUMENTS, "{")
        before = name + (mark or "")
        if mark == _ID:
            made_id, mark = yield from self.take_until(_ARGUMENTS, "{")
            before += made_id + (mark or "")
        if mark is None and self.is_cut:
            return
        if mark is None or name.strip() not in self.functions:
            yield Content(read + before)
            return
        self.held = "{" + self.held if mark == "{" else self.held
        yield self.begin(name.strip())
        yield from self.take_blanks()
        if self.held.startswith("{"):
            yield from self.give_object(self.argue)
        yield self.end()
