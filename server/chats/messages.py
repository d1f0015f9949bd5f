"""Chat messages as clients send them to messages as chat templates expect them.

They are the request's own JSON but for these things. A developer is the system; content that is null is empty; a part
of text is of the type "text", whatever dialect's name it has; a tool's result is a text; a call is one of a tool, and
its arguments are the object that their text stands for, since templates write the JSON themselves; and reasoning has
the names that templates know it by, as in transformers.
"""

from collections.abc import Sequence
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.server.chats.older_calls import bent_calls, with_tool_calls
from tightrope.server.chats.requests import REASONING, ContentPart, Message, ToolCall
from tightrope.server.fields.names import Bent
from tightrope.server.http.body import parse_json
from tightrope.server.http.errors import MalformedBody

TEXT_TYPES = frozenset({"text", "input_text", "output_text"})  # The last two are of OpenAI's Responses.
THOUGHT_TYPES = frozenset({"thinking", "reasoning", "reasoning_text"})  # Mistral's and Anthropic's is the first.


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with content of text or parts of text. Raises InvalidRequest with the place of what is neither."""
    return [_message(message, f"messages[{place}]") for place, message in enumerate(with_tool_calls(messages))]


def bent_messages(messages: Sequence[Message]) -> list[Bent]:
    """What in messages was taken for what it plainly means, and how."""
    bent: list[Bent] = []
    for place, message in enumerate(messages):
        name = f"messages[{place}]"
        bent += bent_calls(message, name)
        if message.content is None and not _calls(message):
            bent.append((f"{name}.content", "null is an empty text"))
        elif isinstance(message.content, str) and message.given.get("content") != message.content:
            bent.append((f"{name}.content", "taken as its JSON text"))
        elif isinstance(message.content, list) and message.given.get("content") != [p.given for p in message.content]:
            bent.append((f"{name}.content", "taken as a list of parts"))
        for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if _is_thought(part, message):
                bent.append((f"{name}.content[{index}]", "taken as reasoning_content"))
            elif part.given.get("type") != "text":
                bent.append((f"{name}.content[{index}]", "taken as a part of text"))
        for index, call in enumerate(message.tool_calls or ()):
            if call.given.get("type") == "":
                bent.append((f"{name}.tool_calls[{index}].type", "taken as function"))
            if isinstance(call.function.arguments, dict):
                bent.append((f"{name}.tool_calls[{index}].function.arguments", "an object, as its JSON text"))
    return bent


def _calls(message: Message) -> bool:
    return bool(message.tool_calls) or message.function_call is not None


def _message(message: Message, place: str) -> dict[str, Any]:
    made = {name: value for name, value in message.given.items() if value is not None}
    if message.role == "developer":
        made["role"] = "system"
    if message.content is None:
        if not message.tool_calls:
            made["content"] = ""
    elif isinstance(message.content, list):
        parts = [(f"{place}.content[{i}]", part) for i, part in enumerate(message.content)]
        made["content"] = [_part(part, where) for where, part in parts if not _is_thought(part, message)]
        thoughts = [_thought(part) for _, part in parts if _is_thought(part, message)]
        if thoughts and not made.keys() & set(REASONING):
            made["reasoning_content"] = "\n\n".join(filter(None, thoughts))
    else:
        made["content"] = message.content
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    else:
        made.pop("tool_calls", None)  # Some templates take an empty list for calls.
    return _with_reasoning(made)


def _is_thought(part: ContentPart, message: Message) -> bool:
    return part.type in THOUGHT_TYPES and message.role == "assistant"


def _thought(part: ContentPart) -> str:
    """The text of a part of thoughts, which may be parts of text again."""
    told = next((part.given[name] for name in (*REASONING, "text") if part.given.get(name) is not None), "")
    pieces = told if isinstance(told, list) else [told]
    texts = [piece.get("text") if isinstance(piece, dict) else piece for piece in pieces]
    return "".join(text for text in texts if isinstance(text, str))


def _part(part: ContentPart, place: str) -> dict[str, Any]:
    if part.type == "refusal":
        text = part.refusal or part.text or ""
        return {"type": "text", "text": text}
    if part.type not in TEXT_TYPES:
        raise InvalidRequest(f"{place}: this model takes text alone, no part of type {part.type[:40]!r}", place)
    if "text" not in part.given:
        raise InvalidRequest(f"{place}.text: field required", f"{place}.text")
    return {**part.given, "type": "text", "text": part.text or ""}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function: dict[str, Any] = call.given["function"]
    made = {**call.given, "function": {**function, "arguments": _arguments(call.function.arguments)}}
    return {"type": "function", **made} | {"type": call.type}


def _arguments(arguments: str | dict[str, Any]) -> object:
    """The object; what is no JSON is shown as the model wrote it."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_json(arguments.encode("utf-8", "replace")) if arguments.strip() else {}
    except MalformedBody:
        return arguments


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[name] for name in REASONING if name in message), None)
    if thought is None:
        return message
    made = {"thinking": thought, **message, "reasoning_content": thought}
    return made if "reasoning" in made else {**made, "reasoning": thought}
