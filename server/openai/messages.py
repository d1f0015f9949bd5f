"""Chat messages as the API has them to messages as chat templates expect them."""

from typing import Any

import msgspec

from tightrope.engine.errors import InvalidRequest
from tightrope.server.builtin_templates import FIXED_VARIABLES
from tightrope.server.openai.requests import ChatRequest, ContentPart, Message, ToolCall


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages with text content. Raises InvalidRequest with the place of what a template can't take."""
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": _content(message, place)}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return made


def _content(message: Message, place: str) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise InvalidRequest(f"{place}.content: null is only allowed for an assistant's tool calls", f"{place}.content")
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"{place}.content[{index}]") for index, part in enumerate(content))


def _part(part: ContentPart, place: str) -> str:
    if part.type != "text":
        raise InvalidRequest(f"{place}: this model takes text alone, no part of type {part.type[:40]!r}", place)
    if part.text is None:
        raise InvalidRequest(f"{place}.text: field required", f"{place}.text")
    return part.text


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, so they get the object."""
    try:
        arguments: Any = msgspec.json.decode(call.function.arguments)
    except (msgspec.MsgspecError, RecursionError):
        arguments = call.function.arguments
    made = {"type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    return made if call.id is None else {"id": call.id, **made}


def template_variables(body: ChatRequest) -> dict[str, Any]:
    """The request's own variables for the template. Raises InvalidRequest for names that the server sets."""
    variables: dict[str, Any] = {}
    for name in ("template_vars", "chat_template_kwargs"):
        given: dict[str, Any] = getattr(body, name) or {}
        if taken := sorted(FIXED_VARIABLES & given.keys()):
            raise InvalidRequest(f"{name} must not set {taken[0]}", name)
        variables |= given
    return variables
