"""Tools and calls in words, for models whose chat template knows none; in the form that Hermes models have."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tightrope.server.prompts.content import text_of, with_text
from tightrope.server.replies.calls.find import HERMES


def takes_tools(template: str) -> bool:
    """Whether a chat template writes tools into the prompt by itself."""
    return re.search(r"\btools\b", template) is not None


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
