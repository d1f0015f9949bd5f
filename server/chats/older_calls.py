"""Calls of functions as OpenAI's chats had them before there were tools.

`functions` and `function_call` of a request are its tools and the choice among them, and an answer calls one at most.
An assistant's `function_call` is its one call, and a message of the role `function` is the result of the latest call of
its name: calls had no ids. Source: OpenAI, "Create chat completion", the fields that are deprecated.
"""

from collections.abc import Sequence
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.server.chats.requests import Message
from tightrope.server.fields.names import Bent


def with_tools(body: object) -> tuple[object, list[Bent]]:
    """The body of a request with tools for functions, and what was taken so. The given one isn't changed."""
    functions = body.get("functions") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(functions, list) or not functions or body.get("tools"):
        return body, []
    made: dict[str, Any] = {name: value for name, value in body.items() if name != "functions"}
    made |= {"tools": [{"type": "function", "function": one} for one in functions], "parallel_tool_calls": False}
    bent = [("functions", "taken as tools")]
    if made.get("function_call") is not None and made.get("tool_choice") is None:
        made["tool_choice"] = made.pop("function_call")
        bent.append(("function_call", "taken as tool_choice"))
    return made, bent


def with_tool_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls of tools for those of functions, and their results. Raises InvalidRequest."""
    made: list[Message] = []
    latest: dict[str | None, str | None] = {}  # By the name of a function the id of its call.
    for place, message in enumerate(messages):
        made.append(_with_tool_calls(message, f"messages[{place}]", f"call{place:05}", latest.get(message.name)))
        latest |= {call.function.name: call.id for call in made[-1].tool_calls or ()}
    return made


def _with_tool_calls(message: Message, place: str, call_id: str, latest: str | None) -> Message:
    """call_id: of the message's own call; nine letters and digits, as Mistral's templates want them."""
    given = {name: value for name, value in message.given.items() if name != "function_call"}
    if message.function_call is not None:
        if message.tool_calls:
            what = f"{place}.function_call"
            raise InvalidRequest(f"{what}: tool_calls came too; send one of them", what)
        call = {"id": call_id, "type": "function", "function": message.given["function_call"]}
        return type(message).model_validate({**given, "tool_calls": [call]})
    if message.role == "function":
        return type(message).model_validate({**given, "role": "tool", "tool_call_id": message.tool_call_id or latest})
    return message


def bent_calls(message: Message, place: str) -> list[Bent]:
    """What of a message is in the older form."""
    bent = [(f"{place}.function_call", "taken as tool_calls")] if message.function_call is not None else []
    return [*bent, *([(f"{place}.role", "taken as tool")] if message.role == "function" else [])]
