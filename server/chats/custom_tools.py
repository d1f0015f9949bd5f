"""Custom tools, as OpenAI calls those that are called with a text instead of a JSON object.

Models know functions alone. So each is shown as a function of one text, and what a call says is taken out of its
arguments again, piece by piece (server/replies/input_text.py). Source: OpenAI, "Function calling", Custom tools.
"""

import json
from collections.abc import Mapping
from typing import Any

from tightrope.server.replies.input_text import INPUT


def function_of(custom: Mapping[str, Any]) -> dict[str, Any]:
    """The function that a custom tool is shown as. Raises ValueError for what it can't be, with the field's name."""
    name, about = custom.get("name"), custom.get("description") or ""
    if not isinstance(name, str) or not isinstance(about, str):
        raise ValueError("name and description should be texts, and a tool needs a name")
    pattern = _pattern(custom.get("format"))
    text: dict[str, Any] = {"type": "string", "description": "The whole input of the tool, as text."}
    if pattern is not None:
        text |= {"pattern": f"^(?:{pattern})$"}
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
    strict = {} if pattern is None else {"strict": True}
    return {"name": name, "description": about, "parameters": parameters, **strict}


def _pattern(form: object) -> str | None:
    """The regular expression that inputs match; None for any text."""
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") not in ("text", "grammar"):
        raise ValueError('format should be {"type": "text"} or {"type": "grammar", ...}')
    if form["type"] == "text":
        return None
    inner = form.get("grammar")
    told = inner if isinstance(inner, dict) else form  # Chats have an object around what Responses have here.
    syntax, definition = told.get("syntax"), told.get("definition")
    if syntax == "lark":
        raise ValueError("format: a Lark grammar can't be enforced within a call, whose text is JSON; a regex can")
    if syntax != "regex" or not isinstance(definition, str):
        raise ValueError("format: a grammar has a syntax, regex, and a definition, which is a text")
    return definition


def tool_in_chats(tool: object) -> object:
    """A custom tool of a chat with its function in place; anything else as it is. Raises ValueError."""
    if not isinstance(tool, dict) or tool.get("type") != "custom":
        return tool
    custom = tool.get("custom")
    if not isinstance(custom, dict):
        raise ValueError("custom should be an object with the tool's name")
    return {"type": "custom", "function": function_of(custom)}


def call_in_chats(call: object) -> object:
    """A call of a custom tool in the history, as one of its function; anything else as it is. Raises ValueError."""
    if not isinstance(call, dict) or call.get("type") != "custom":
        return call
    custom = call.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get("input"), str):
        raise ValueError("custom should be an object with the tool's name and its input, a text")
    function = {"name": custom.get("name"), "arguments": arguments_of(custom["input"])}
    return {
        **{name: value for name, value in call.items() if name != "custom"},
        "type": "function",
        "function": function,
    }


def arguments_of(text: str) -> str:
    """The arguments of the function that stand for a custom tool's input."""
    return json.dumps({INPUT: text}, ensure_ascii=False)
