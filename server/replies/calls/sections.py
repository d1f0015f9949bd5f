"""Calls in a section of their own, each a name, a mark and JSON arguments: DeepSeek's and Kimi's.

Sources: the chat templates of DeepSeek-V3 and R1 (a kind and a block of code), DeepSeek-V3.1, and Kimi-K2 (names that
are ids as well).
"""

from dataclasses import dataclass

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.call_ids import CallId, long_id, numbered_id
from tightrope.server.replies.calls.form import MAX_CALLS, CallForm, Functions, alternatives, arguments_schema
from tightrope.server.replies.calls.json_reader import JsonReader
from tightrope.server.replies.events import Content
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.reader import Steps

_FENCE = "```json"


@dataclass(frozen=True, slots=True)
class SectionCalls(CallForm):
    """The marks of a family."""

    call: str
    separator: str  # It stands behind the name, or before it where a kind comes first.
    call_end: str
    section_end: str
    before_name: str = ""  # This text is forced between the mark of a call and its name.
    behind_name: str = ""
    behind_arguments: str = ""
    is_numbered: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opening, self.call, self.separator, self.call_end, self.section_end)

    @property
    def stop(self) -> str:
        return self.section_end

    @property
    def made_id(self) -> CallId:
        return numbered_id if self.is_numbered else long_id

    def reader(self, functions: Functions, made_id: CallId) -> "SectionReader":
        return SectionReader(self, functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        bodies = [
            f"{spelling.of(self.before_name + name + self.behind_name)} "
            f"{lark_of_schema(arguments_schema(schema), is_compact=is_compact)} "
            f"{spelling.of(self.behind_arguments + self.call_end)}"
            for name, schema in functions.items()
        ]
        call = spelling.of(self.call)
        more = "" if one_call else f' ("\n"? {call} call){{0,{MAX_CALLS - 1}}}'.replace("\n", "\\n")
        return f"calls: {call} call{more} {spelling.of(self.section_end)}\n{alternatives('call', bodies)}"


_BEGIN, _CALL, _SEPARATOR = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
_CALL_END, _END = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
DEEPSEEK_V3 = SectionCalls(
    *(_BEGIN, _CALL, _SEPARATOR, _CALL_END, _END, f"function{_SEPARATOR}", f"\n{_FENCE}\n", "\n```")
)
DEEPSEEK = SectionCalls(*(_BEGIN, _CALL, _SEPARATOR, _CALL_END, _END), behind_name=_SEPARATOR)
KIMI = SectionCalls(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    before_name="functions.",
    behind_name=":0<|tool_call_argument_begin|>",
    is_numbered=True,
)


class SectionReader(JsonReader):
    """Reads sections, and calls without one around them."""

    def __init__(self, form: SectionCalls, functions: Functions, made_id: CallId) -> None:
        self._form = form
        super().__init__(functions, made_id)

    def read(self) -> Steps[None]:
        form = self._form
        while (mark := (yield from self.give_until([form.opening, form.call]))) is not None:
            before = ""
            if mark == form.opening:
                before = mark + (yield from self.take_blanks())
                mark = yield from self.take_if(form.call)
            while mark == form.call:
                yield from self._call(before + form.call)
                yield from self.take_blanks()
                before, mark = "", (yield from self.take_if(form.call, form.section_end))
            if mark == form.section_end:
                yield from self.take_blanks()
            elif before and not (self.is_cut and not self.held):
                yield Content(before)

    def _call(self, read: str) -> Steps[None]:
        """A call of which the mark was read; one of an unknown function is content."""
        form = self._form
        name, mark = yield from self.take_until(form.separator, form.call_end)
        read += name + (mark or "")
        if mark == form.separator and name.strip() == "function":
            name, line = yield from self.take_until("\n", form.call_end)
            read, mark = read + name + (line or ""), None if line is None else mark
        if form.is_numbered:
            name = name.strip().removeprefix("functions.").rpartition(":")[0]
        if mark == form.separator and name.strip() in self.functions:
            yield self.begin(name.strip())
            yield from self.take_blanks()
            yield from self.take_if(_FENCE)
            yield from self.take_blanks()
            if self.held.startswith("{"):
                yield from self.give_object(self.argue)
            yield self.end()
            yield from self.take_until(form.call_end)
            return
        if not read.endswith(form.call_end):
            rest, end = yield from self.take_until(form.call_end)
            read += rest + (end or "")
        if read.endswith(form.call_end) or not self.is_cut:
            yield Content(read)
