"""Gemma's calls: `call:NAME{key:value}` between marks, with texts between a mark of their own and bare keys.

Sources: the model cards and chat templates of FunctionGemma (`<start_function_call>`, `<escape>`) and Gemma 4
(`<|tool_call>`, `<|"|>`).
"""

import re
from dataclasses import dataclass
from typing import Any

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.call_ids import CallId
from tightrope.server.replies.calls.form import CallForm, CallReader, Functions, Schema, alternatives
from tightrope.server.replies.calls.values import (
    BOUNDS_OF_TEXT,
    as_json,
    cannot,
    named_properties,
    resolved,
    rooted,
    text_rule,
)
from tightrope.server.replies.events import Content
from tightrope.server.replies.lark import REST, Spelling, literal, quoted
from tightrope.server.replies.reader import Steps

_MAX_DEPTH = 32
_SCALAR = re.compile(r"[^,{}\[\]]*")
_OF_LISTS = frozenset({"contains", "prefixItems", "minContains", "maxContains"})
_ANY: Schema = {"type": ["number", "boolean", "null"]}


@dataclass(frozen=True, slots=True)
class GemmaCalls(CallForm):
    """The marks of a family."""

    closing: str
    quote: str

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opening, self.closing, self.quote)

    @property
    def stop(self) -> str:
        return self.closing

    def reader(self, functions: Functions, made_id: CallId) -> "GemmaReader":
        return GemmaReader(self, functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        rules = _Rules(self.quote, spelling, is_compact=is_compact)
        closing = spelling.of(self.closing)
        bodies = [
            f"{literal(f'call:{name}')} {rules.of_object(schema, schema)} {closing}"
            for name, schema in functions.items()
        ]
        more = "" if one_call else f" ({spelling.of(self.opening)} call){{0,15}}"
        return "\n".join((f"calls: call{more}", alternatives("call", bodies), *rules.lines))


FUNCTION_GEMMA = GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4 = GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>')


class _Rules:
    """Lark for values in this notation; each has a rule in `lines`."""

    def __init__(self, quote: str, spelling: Spelling, *, is_compact: bool) -> None:
        self.lines: list[str] = []
        self._is_compact = is_compact
        self._mark, self._spelling = quote, spelling
        self._quote = spelling.of(quote)
        if spelling.is_token(quote):
            self.lines += [f"text: {self._quote} QUOTED {self._quote}", f"QUOTED: {REST}"]
        else:
            self.lines += [f"text: {self._quote} texttail", f"texttail[lazy]: /(?s:.*){quoted(quote)}/"]
        scalar = lark_of_schema(_ANY, is_compact=is_compact)
        self.lines += [
            f"any: text | {scalar} | anylist | anyobject",
            'anylist: "[" (any ("," any)*)? "]"',
            r'anyobject: "{" (/[A-Za-z_][\w-]*/ ":" any ("," /[A-Za-z_][\w-]*/ ":" any)*)? "}"',
        ]

    def of_object(self, schema: Schema, root: Schema, depth: int = 0) -> str:
        """The name of the rule for an object with the properties of the schema, in their order."""
        parts = named_properties(schema)
        if not parts:
            return "anyobject" if schema.get("additionalProperties") is True or depth else '"{}"'
        parts = sorted(parts, key=lambda part: not part[2])
        made = ""
        for number, (name, one, is_required) in enumerate(reversed(parts)):
            value = f"{literal(name + ':')} {self._of(name, one, root, depth + 1)}"
            value = value if number == len(parts) - 1 else f'"," {value}'
            made = f"{value} {made}" if is_required else f"({value} {made})?"
        return self._rule(f'"{{" {made} "}}"')

    def _of(self, name: str, schema: Schema, root: Schema, depth: int) -> str:
        """Lark for a value of the argument `name`, or in it. Raises InvalidRequest."""
        schema = resolved(schema, root)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            texts = [self._text(value) if isinstance(value, str) else literal(as_json(value)) for value in values]
            return f"({' | '.join(texts)})"
        several = [one for key in ("anyOf", "oneOf") for one in schema.get(key, ())]
        kinds = schema.get("type")
        if isinstance(kinds, list):
            several = [{**schema, "type": kind} for kind in kinds]
        if depth > _MAX_DEPTH:
            return "any"
        if several:
            return f"({' | '.join(self._of(name, one, root, depth + 1) for one in several)})"
        match kinds:
            case "string":
                return self._of_text(name, schema, root)
            case "array":
                return self._of_list(name, schema, root, depth)
            case "object":
                return self.of_object(schema, root, depth)
            case "integer" | "number" | "boolean" | "null":
                return lark_of_schema(rooted(schema, root), is_compact=self._is_compact)
        return "any"

    def _of_text(self, name: str, schema: Schema, root: Schema) -> str:
        if not schema.keys() & BOUNDS_OF_TEXT:
            return "text"
        attributes, body = text_rule(name, schema, self._mark, root, self._spelling, is_compact=self._is_compact)
        return f"{self._quote} {self._rule(body, attributes)}"

    def _of_list(self, name: str, schema: Schema, root: Schema, depth: int) -> str:
        if held := sorted(schema.keys() & _OF_LISTS):
            raise cannot(f"{held[0]} of {name}")
        item = "any"
        if isinstance(schema.get("items"), dict):
            item = self._of(name, schema["items"], root, depth + 1)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        more = "" if most == 1 else f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        return self._rule(f'"[" ({item} {more}){"?" if least == 0 else ""} "]"')

    def _text(self, value: str) -> str:
        return f"({self._quote} {literal(value)} {self._quote})"

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"part{len(self.lines)}"
        self.lines.append(f"{name}{attributes}: {body}")
        return name


class GemmaReader(CallReader):
    """Gives out each call when it is whole."""

    def __init__(self, form: GemmaCalls, functions: Functions, made_id: CallId) -> None:
        self._form = form
        super().__init__(functions, made_id)

    def read(self) -> Steps[None]:
        form = self._form
        while (opening := (yield from self.give_until([form.opening]))) is not None:
            text, mark = yield from self.take_until(form.closing)
            name, brace, rest = text.strip().removeprefix("call:").partition("{")
            arguments = None if name not in self.functions or not brace else _read(brace + rest, form.quote)
            if arguments is not None:
                yield from self.whole(name, as_json(arguments))
                yield from self.take_blanks()
            elif mark is not None or not self.is_cut:
                yield Content(opening + text + (mark or ""))


def _read(text: str, quote: str) -> dict[str, Any] | None:
    """An object in this notation; None where it is none, or goes on behind."""
    try:
        value, end = _value(text, 0, quote, 0)
    except (ValueError, IndexError):
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None


def _value(text: str, start: int, quote: str, depth: int) -> tuple[Any, int]:
    """A value, and the place behind it. Raises ValueError and IndexError where there is none."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if text.startswith(quote, start):
        end = text.index(quote, start + len(quote))
        return text[start + len(quote) : end], end + len(quote)
    if text[start] in "{[":
        return _several(text, start, quote, depth)
    found = _SCALAR.match(text, start)
    word = "" if found is None else found[0]
    return _scalar(word.strip()), start + len(word)


def _several(text: str, start: int, quote: str, depth: int) -> tuple[Any, int]:
    """An object or a list."""
    is_object = text[start] == "{"
    made_object, made_list, place = dict[str, Any](), list[Any](), start + 1
    while text[place] not in "}]":
        if is_object:
            colon = text.index(":", place)
            key = text[place:colon].strip().removeprefix(quote).removesuffix(quote).strip('"')
            made_object[key], place = _value(text, colon + 1, quote, depth + 1)
        else:
            value, place = _value(text, place, quote, depth + 1)
            made_list.append(value)
        if text[place] == ",":
            place += 1
    return made_object if is_object else made_list, place + 1


def _scalar(word: str) -> object:
    constants = {"true": True, "false": False, "null": None, "none": None}
    if word.lower() in constants:
        return constants[word.lower()]
    for read in (int, float):
        try:
            number = read(word)
        except ValueError:
            continue
        return number if number == number and abs(number) != float("inf") else word
    return word.strip("\"'")
