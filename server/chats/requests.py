"""The parts of a chat in a request's body, and what clients make of them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tightrope.server.chats.custom_tools import call_in_chats
from tightrope.server.http.body import EVERY_NAME, Body, ShownBody

# An assistant's thoughts before its words come under these names.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ContentPart(ShownBody):
    """A piece of a message; text alone is understood."""

    read_elsewhere = frozenset({"refusal", "annotations", "logprobs", "cache_control"})

    type: str = "text"
    text: str | None = None
    refusal: str | None = None


def _parts(content: object) -> object:
    """One part alone is a list of one, a text among parts is a part, and a null among them is none."""
    if isinstance(content, dict):
        return [content]
    if isinstance(content, list):
        whole = [part for part in content if part is not None]
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in whole]
    return content


Content = Annotated[str | list[ContentPart] | None, BeforeValidator(_parts)]


class FunctionCall(Body):
    """Which function the assistant called, and with what: a JSON object, or its text."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(ShownBody):
    """A call in an assistant's earlier turn; one of a custom tool is read as one of its function."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(ShownBody):
    """One turn of the chat. Whatever else is in it is for the chat template, which may read it or not."""

    read_elsewhere = frozenset(REASONING)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[Annotated[ToolCall, BeforeValidator(call_in_chats)]] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """A function that the model may call; it is shown to the model as it came, with whatever else is in it."""

    read_elsewhere = EVERY_NAME

    name: str = Field(description="1 to 128 letters, digits and characters of _-./:")
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; default: no parameters.")
    strict: bool | None = Field(None, description="Calls that the model decides on are valid under the schema too.")


class Tool(ShownBody):
    """A function, or a custom tool with the function that it is shown as."""

    read_elsewhere = EVERY_NAME

    type: Literal["function", "custom"] = "function"
    function: Function
