"""How models write tool calls."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.prompts.content import text_of, with_text

NAME_CHARACTER = r"[a-zA-Z0-9_./:-]"  # Names of functions are made of these; gateways join them with dots and slashes.
MAX_CALLS = 16  # One answer is forced to so many at most.

Schema = Mapping[str, Any]  # It is a JSON schema.


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A JSON object of the function's name and its arguments, between two texts.

    Source of the first: Nous Research, "Hermes Function Calling"; of the second: Meta, "Llama 3.1 model card".
    """

    opening: str
    closing: str
    arguments: str  # The arguments stand under this key.

    def grammar(self, functions: Mapping[str, Schema], *, one_call: bool) -> str:
        """Lark for one call of these functions, or several, and nothing besides; no token goes on white space."""
        more = "" if one_call else f' ("\\n" call){{0,{MAX_CALLS - 1}}}'
        return "\n".join((f"start: call{more}", *self._rules(functions, self._text("\n"), is_compact=True)))

    def free_grammar(self, functions: Mapping[str, Schema]) -> str:
        """Lark for any text, in which what begins like a call is one."""
        if not self.opening:
            return "\n".join(("start: call | FREE", *self._rules(functions, ""), r"FREE: /([^\s{](?s:.*))?/"))
        return "\n".join(
            (
                "start: (opened call)* FREE",
                *self._rules(functions, "\n"),
                f"opened[lazy]: /(?s:.*){self.opening}/",
                f"FREE: /(?s:.*)/ & ~/(?s:.*){self.opening}(?s:.*)/",
            )
        )

    def _text(self, after: str) -> str:
        return f"{self.opening}{after}" if self.opening else ""

    def _rules(self, functions: Mapping[str, Schema], before: str, *, is_compact: bool = False) -> Sequence[str]:
        """The rule `call`, and one for each function; `before` is what a call begins with."""
        end = json.dumps("}" + ("\n" + self.closing if self.closing else ""))
        rules = [f"call: {' | '.join(f'call{number}' for number in range(len(functions)))}"]
        for number, (name, schema) in enumerate(functions.items()):
            head = json.dumps(f'{before}{{"name": "{name}", "{self.arguments}": ')
            rules.append(f"call{number}: {head} {lark_of_schema(_arguments(schema), is_compact=is_compact)} {end}")
        return rules


def _arguments(schema: Schema) -> Schema:
    """The schema of a function's arguments: one that names none takes none."""
    if schema.keys() <= {"type", "properties"} and not schema.get("properties"):
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema}


HERMES = CallFormat("<tool_call>", "</tool_call>", "arguments")
LLAMA = CallFormat("", "", "parameters")


def takes_tools(template: str) -> bool:
    """Whether a chat template writes tools into the prompt by itself."""
    return re.search(r"\btools\b", template) is not None


def call_format(template: str) -> CallFormat:
    """The format that a chat template speaks of; the one with marks around the call if it speaks of none."""
    is_llama = HERMES.opening not in template and takes_tools(template) and '"parameters"' in template
    return LLAMA if is_llama else HERMES


# ---- for models whose template knows no tools ----

_INTRODUCTION = """You may call functions to help with the user's request. These are the functions, one in each line:
<tools>
{tools}
</tools>
To call one, write nothing but this, with the function's name and its arguments:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


_CALL = ("name", "arguments")


def with_tool_text(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat without anything that such a template doesn't know.

    The tools stand at the end of the first system message, in plain words; earlier calls are the assistant's text, and
    their results the user's, in the marks that HERMES has.
    """
    made = [_plain_message(message) for message in messages]
    if not tools:
        return made
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines)
    if made[0]["role"] != "system":
        return [{"role": "system", "content": text}, *made]
    return [with_text(made[0], lambda system: f"{system}\n\n{text}"), *made[1:]]


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text_of(message)}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = [
        f"{HERMES.opening}\n{json.dumps({key: function[key] for key in _CALL}, ensure_ascii=False)}\n{HERMES.closing}"
        for function in (call["function"] for call in message["tool_calls"])
    ]
    return {"role": message["role"], "content": "\n".join(filter(None, (text_of(message), *calls)))}
