"""The parts of a chat in a request's body, and what clients make of them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, ValidationInfo, model_validator

from tightrope.server.chats.custom_tools import call_in_chats
from tightrope.server.chats.results import result_text
from tightrope.server.http.body import EVERY_NAME, Body, ShownBody

# An assistant's thoughts before its words come under these names.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ContentPart(ShownBody):
    """A piece of a message; text alone is understood."""

    read_elsewhere = frozenset({"refusal", "annotations", "logprobs", "cache_control", "signature", *REASONING})

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


def _told(content: object, info: ValidationInfo) -> object:
    """The content of a message; a tool's result may be any JSON."""
    return result_text(content) if info.data.get("role") in ("tool", "function") else content


def _kind(kind: object) -> object:
    """Programs write an empty text where they leave the type of a tool out."""
    return "function" if kind == "" else kind


def _object(arguments: object) -> object:
    """PHP's programs write an empty object as an empty list."""
    return {} if arguments == [] else arguments


class FunctionCall(Body):
    """Which function the assistant called, and with what: a JSON object, or its text."""

    name: str
    arguments: Annotated[str | dict[str, Any], BeforeValidator(_object)] = "{}"


class ToolCall(ShownBody):
    """A call in an assistant's earlier turn; one of a custom tool is read as one of its function."""

    id: str | None = None
    type: Annotated[Literal["function"], BeforeValidator(_kind)] = "function"
    function: FunctionCall


class Message(ShownBody):
    """One turn of the chat. Whatever else is in it is for the chat template, which may read it or not."""

    read_elsewhere = frozenset(REASONING)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Content, BeforeValidator(_told)] = None
    name: str | None = None
    tool_calls: list[Annotated[ToolCall, BeforeValidator(call_in_chats)]] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = Field(None, description="The older form of tool_calls: one call alone.")


class Function(Body):
    """A function that the model may call; it is shown to the model as it came, with whatever else is in it."""

    read_elsewhere = EVERY_NAME

    name: str = Field(description="1 to 128 letters, digits and characters of _-./:")
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; default: no parameters.")
    strict: bool | None = Field(None, description="Calls that the model decides on are valid under the schema too.")


class Tool(ShownBody):
    """A function, or a custom tool with the function that it is shown as."""

    read_elsewhere = EVERY_NAME

    type: Annotated[Literal["function", "custom"], BeforeValidator(_kind)] = "function"
    function: Function

    _is_bent: bool = PrivateAttr(default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _in_place(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        placed = _with_function(data)
        made = handler(placed)
        made._is_bent = placed is not data
        return made

    @property
    def is_bent(self) -> bool:
        """Whether its type was empty, or its function stood beside it, as in other dialects."""
        return self._is_bent or self.given.get("type") == ""


def _with_function(tool: object) -> object:
    """OpenAI's Responses have a function's fields beside its type, and Anthropic its parameters as `input_schema`."""
    if not isinstance(tool, dict) or tool.get("function") is not None or not isinstance(tool.get("name"), str):
        return tool
    renamed = {"input_schema": "parameters"}
    function = {renamed.get(name, name): value for name, value in tool.items() if name != "type"}
    return {"type": tool.get("type") or "function", "function": function}
