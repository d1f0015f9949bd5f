"""Chat messages as the API has them to messages as chat templates expect them.

They are the request's own JSON but for three things. A developer is the system; a call's arguments are the object that
its text stands for, since templates write the JSON themselves; and reasoning has the names that templates know it by,
as in transformers.
"""

from contextlib import suppress
from typing import Any

import msgspec

from tightrope.engine.errors import InvalidRequest
from tightrope.server.dialects.openai.requests import REASONING, ChatRequest, ContentPart, Message, ToolCall
from tightrope.server.prompts.prompt_formats import FIXED_VARIABLES


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages with content of text or parts of text. Raises InvalidRequest with the place of what is neither."""
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, Any]:
    made = {name: value for name, value in message.given.items() if value is not None}
    if message.role == "developer":
        made["role"] = "system"
    if message.content is None:
        _check_may_be_empty(message, place)
        if not message.tool_calls:
            made["content"] = ""
    elif isinstance(message.content, list):
        made["content"] = [_part(part, f"{place}.content[{i}]") for i, part in enumerate(message.content)]
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    else:
        made.pop("tool_calls", None)  # Some templates take an empty list for calls.
    return _with_reasoning(made)


def _check_may_be_empty(message: Message, place: str) -> None:
    if message.role not in ("assistant", "tool"):
        raise InvalidRequest(
            f"{place}.content: null is only allowed in messages of an assistant or a tool", f"{place}.content"
        )


def _part(part: ContentPart, place: str) -> dict[str, Any]:
    if part.type != "text":
        raise InvalidRequest(f"{place}: this model takes text alone, no part of type {part.type[:40]!r}", place)
    if part.text is None:
        raise InvalidRequest(f"{place}.text: field required", f"{place}.text")
    return part.given


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function: dict[str, Any] = call.given["function"]
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        with suppress(msgspec.MsgspecError, RecursionError):  # What is no JSON is shown as the model wrote it.
            arguments = msgspec.json.decode(arguments)
    made = {**call.given, "function": {**function, "arguments": arguments}}
    return made if "type" in made else {"type": "function", **made}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[name] for name in REASONING if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def template_variables(body: ChatRequest) -> dict[str, Any]:
    """The request's own variables for the template. Raises InvalidRequest for names that the server sets."""
    variables: dict[str, Any] = {}
    for name in ("template_vars", "chat_template_kwargs"):
        given: dict[str, Any] = getattr(body, name) or {}
        if taken := sorted(FIXED_VARIABLES & given.keys()):
            raise InvalidRequest(f"{name} must not set {taken[0]}", name)
        variables |= given
    return variables
