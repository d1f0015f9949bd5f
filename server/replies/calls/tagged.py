"""Calls whose arguments stand one by one between tags, as text: Qwen3-Coder's, GLM's, MiniMax' and DeepSeek's newer.

Sources: the model cards of Qwen3-Coder (`<function=NAME>`, `<parameter=KEY>`) and GLM-4.5 (`<arg_key>`, `<arg_value>`);
the tool calling guide of MiniMax-M2 (`<invoke name="NAME">`); the encoding of DeepSeek-V3.2 (`<｜DSML｜invoke`), which
V4 has under another opening.
"""

from dataclasses import dataclass

from tightrope.server.replies.call_ids import CallId
from tightrope.server.replies.calls.form import MAX_CALLS, CallForm, CallReader, Functions, Schema, alternatives
from tightrope.server.replies.calls.values import as_json, may_be_text, named_properties, text_rule, value_of
from tightrope.server.replies.events import Content
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.reader import Steps

_DSML = "｜DSML｜"


@dataclass(frozen=True, slots=True)
class TaggedCalls(CallForm):
    """The tags of a family; between them stand names and values."""

    before_name: str  # It stands behind the opening.
    behind_name: str
    before_key: str
    behind_key: str
    before_value: str
    behind_value: str
    end: str  # It ends the arguments, and stands before the closing.
    closing: str
    has_lines: bool  # Names stand in lines of their own.
    has_value_lines: bool  # So do values.
    is_joined: bool = False  # Several calls stand between one opening and one closing.
    has_kinds: bool = False  # Behind a key stands whether its value is a text, or JSON.

    @property
    def marks(self) -> tuple[str, ...]:
        if self.has_kinds:
            return (_DSML,)  # Of each tag this alone is a token.
        tags = (self.opening, self.closing, self.before_key, self.behind_key, self.before_value, self.behind_value)
        return tuple(dict.fromkeys(tag for tag in tags if tag.startswith("<") and tag.endswith(">")))

    @property
    def stop(self) -> str:
        return self.closing

    def reader(self, functions: Functions, made_id: CallId) -> "TaggedReader":
        return TaggedReader(self, functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        line = "\n" if self.has_lines else ""
        end = self.end + (line + self.closing if self.end and self.closing else self.closing)
        closing = spelling.of(self.end if self.is_joined else end)
        rules: list[str] = []
        bodies = []
        for number, (name, schema) in enumerate(functions.items()):
            start = f"{line if self.before_name else ''}{self.before_name}{name}{self.behind_name}\n"
            arguments = self._arguments(f"f{number}", schema, spelling, rules, is_compact=is_compact)
            bodies.append(f"{spelling.of(start)} {arguments} {closing}")
        if self.is_joined:
            more = "" if one_call else f" call{{0,{MAX_CALLS - 1}}}"
            return "\n".join(
                (f"calls: call{more} {spelling.of(line + self.closing)}", alternatives("call", bodies), *rules)
            )
        again = spelling.of("\n" + self.opening) if self.opening != self.before_name else ""
        more = "" if one_call or not again else f" ({again} call){{0,{MAX_CALLS - 1}}}"
        return "\n".join((f"calls: call{more}", alternatives("call", bodies), *rules))

    def _arguments(self, prefix: str, schema: Schema, spelling: Spelling, rules: list[str], *, is_compact: bool) -> str:
        """Lark for the arguments in the order of the schema; adds a rule for each."""
        parts = []
        line = "\n" if self.has_value_lines else ""
        for number, (name, one, is_required) in enumerate(named_properties(schema)):
            kind = f'{str(may_be_text(one, schema)).lower()}">' if self.has_kinds else ""
            before = "" if self.has_kinds else "\n"
            head = spelling.of(
                f"{self.before_key}{name}{self.behind_key}{kind}{before}{self.before_value}".rstrip("\n") + line
            )
            closing = f"{line}{self.behind_value}"
            attributes, body = text_rule(name, one, closing, schema, spelling, is_compact=is_compact)
            rules.append(f"{prefix}v{number}{attributes}: {body}")
            parts.append(f'({head} {prefix}v{number} "\\n"){"" if is_required else "?"}')
        if not parts and schema.get("additionalProperties") is True:
            rules.append(rf"{prefix}any[lazy]: /(?s:.*)\n/")
            return f"{prefix}any"
        return " ".join(parts)


_CODER = (">", "<parameter=", ">", "", "</parameter>", "</function>")
QWEN_CODER = TaggedCalls("<tool_call>", "<function=", *_CODER, "</tool_call>", True, True)
BARE_FUNCTIONS = TaggedCalls("<function=", "", *_CODER, "", True, True)
_GLM = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "", "</tool_call>")
GLM = TaggedCalls("<tool_call>", "", "", *_GLM, False, False)
_MINIMAX = ('">', '<parameter name="', '">', "", "</parameter>", "</invoke>", "</minimax:tool_call>")
MINIMAX = TaggedCalls("<minimax:tool_call>", '<invoke name="', *_MINIMAX, True, False, is_joined=True)


def _deepseek(name: str) -> TaggedCalls:
    tags = (f'<{_DSML}parameter name="', '" string="', "", f"</{_DSML}parameter>", f"</{_DSML}invoke>")
    return TaggedCalls(
        *(f"<{_DSML}{name}>", f'<{_DSML}invoke name="', '">', *tags, f"</{_DSML}{name}>"),
        has_lines=True,
        has_value_lines=False,
        is_joined=True,
        has_kinds=True,
    )


DEEPSEEK_V32, DEEPSEEK_V4 = _deepseek("function_calls"), _deepseek("tool_calls")


class TaggedReader(CallReader):
    """Gives out each argument when it is whole."""

    def __init__(self, form: TaggedCalls, functions: Functions, made_id: CallId) -> None:
        self._form = form
        super().__init__(functions, made_id)

    def read(self) -> Steps[None]:
        form = self._form
        openings = [form.opening, *([form.before_name] if form.before_name else [])]
        while (read := (yield from self.give_until(openings))) is not None:
            num_before, is_named = self.num_calls, read == form.before_name or not form.before_name
            if not is_named:
                read += yield from self.take_blanks()
                is_named = (found := (yield from self.take_if(form.before_name))) is not None
                read += found or ""
            if is_named:
                name, mark = yield from self.take_until(*self._behind_name)
                if name.strip() in self.functions and not (mark is None and self.is_cut):
                    yield from self._call(name.strip(), mark)
                    yield from self.take_blanks()
                    continue
                read += name + (mark or "")
            if not read.endswith(last := form.closing or form.end):
                rest, mark = yield from self.take_until(last)
                read += rest + (mark or "")
            if self.num_calls == num_before and (read.endswith(last) or not self.is_cut):
                yield Content(read)

    @property
    def _behind_name(self) -> tuple[str, ...]:
        form = self._form
        return (form.behind_name,) if form.behind_name else (form.before_key, form.closing)

    def _call(self, name: str, mark: str | None) -> Steps[None]:
        """A call whose name was read, up to a mark."""
        form, before, is_whole = self._form, "{", True
        yield self.begin(name)
        if mark == form.behind_name:
            yield from self.take_blanks()
            mark = yield from self.take_if(form.before_key)
        while mark == form.before_key:
            key, _ = yield from self.take_until(form.behind_key)
            kind, _ = (yield from self.take_until('">')) if form.has_kinds else ("", None)
            if form.before_value:
                yield from self.take_blanks()
                yield from self.take_if(form.before_value)
            text, end = yield from self.take_until(form.behind_value)
            if is_whole := end is not None:
                text = text.removeprefix("\n").removesuffix("\n") if form.has_value_lines else text
                value = text if kind == "true" else value_of(text, key.strip(), self.functions[name])
                yield self.argue(f"{before}{as_json(key.strip())}: {as_json(value)}")
                before = ", "
            yield from self.take_blanks()
            mark = yield from self.take_if(form.before_key, *self._ends)
        if mark not in self._ends:
            _, mark = yield from self.take_until(*self._ends)
        if mark is not None or (is_whole and not self.is_cut):
            yield self.argue("}" if before == ", " else "{}")
        yield self.end()
        if mark == form.end and form.closing:
            yield from self.take_blanks()
            yield from self.take_if(form.closing)

    @property
    def _ends(self) -> tuple[str, ...]:
        """What ends the arguments."""
        return (self._form.end or self._form.closing,)
