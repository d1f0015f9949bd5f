"""What clients of the Responses API send."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tightrope.server.asking import AnswerBody
from tightrope.server.chats.requests import Content
from tightrope.server.chats.results import result_text
from tightrope.server.fields.names import api_field
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import EVERY_NAME, Body, FirstErrorOnly, ShownBody

MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512  # They are OpenAI's limits.


class ReasoningText(Body):
    """A piece of what the model has thought before."""

    type: str = "reasoning_text"
    text: str = ""


class InputItem(ShownBody):
    """A message, a call, a call's output, or what the model has thought."""

    read_elsewhere = frozenset({"id", "status"})

    type: str = Field(
        "message",
        description="message, function_call, function_call_output, custom_tool_call, custom_tool_call_output or "
        "reasoning; others are refused.",
    )
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, description="Of a message.")
    content: Content = Field(None, description="Of a message: text or parts of text; of reasoning: its text.")
    call_id: str | None = Field(None, description="Of a call, and of its output.")
    name: str | None = Field(None, description="Of the function that is called.")
    arguments: str | dict[str, Any] | None = Field(None, description="A JSON object, or its text.")
    input: str | None = Field(None, description="Of a custom tool's call: a text.")
    output: Annotated[Content, BeforeValidator(result_text)] = Field(
        None, description="Text or parts of text; of any other JSON its text."
    )
    summary: list[ReasoningText] | None = Field(None, description="Of reasoning, where its text is not there.")
    encrypted_content: str | None = Field(None, description="Of reasoning, as this server has given it.")


class ResponsesTool(ShownBody):
    """A function that the model may call, shown to it as it came, or a custom tool. There are no others."""

    read_elsewhere = EVERY_NAME

    type: str = "function"
    name: str | None = Field(None, description="1 to 128 letters, digits and characters of _-./:")
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; default: no parameters.")
    format: dict[str, Any] | None = Field(None, description='Of a custom tool: {"type": "text"}, or a regex grammar.')
    strict: bool | None = Field(None, description="Calls that the model decides on are valid under the schema too.")


class TextFormat(Body):
    """The shape of the answer."""

    read_elsewhere = frozenset({"schema", "name", "description"})

    type: Literal["text", "json_object", "json_schema"] = "text"
    strict: bool | None = Field(None, description="false: what can't be enforced of the schema is left out.")


class TextConfig(Body):
    """What the answer's text is to be like."""

    format: TextFormat | None = None


class Reasoning(Body):
    """How much to think, and how thoughts are told."""

    effort: str | None = Field(None, description='As the template knows it: "low", "high" and so on; "none" is not.')
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Thoughts come as a summary, which is all of them."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="The older name of it.")

    @property
    def wants_summary(self) -> bool:
        return (self.summary or self.generate_summary) is not None


def _items(given: object) -> object:
    """One item alone is a list of one."""
    return [given] if isinstance(given, dict) else given


class ResponsesRequest(AnswerBody):
    """POST /v1/responses."""

    without_effect = frozenset({"stream_options"})

    input: Annotated[str | Annotated[list[InputItem], FirstErrorOnly()], BeforeValidator(_items)] = Field(
        description="The conversation, or one question."
    )
    instructions: str | None = Field(None, description="A system message in front.")
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(
        None, ge=-1, description="At most so many, thoughts included; -1, and the default: to the end of the window."
    )
    temperature: float = api_field("temperature", "0 is greedy.")
    top_p: float = api_field("top_p")
    top_logprobs: int | None = Field(None, ge=0, description="Alternatives at each token of the answer's text.")
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    tools: list[ResponsesTool] | None = None
    tool_choice: str | dict[str, Any] | None = Field(
        None, description='"none", "auto", "required", {"type": "function", "name": ...} or allowed_tools.'
    )
    parallel_tool_calls: bool = Field(True, description="Whether one answer may hold several calls.")
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: of a conversation that is too long the oldest messages are left out."
    )
    include: list[str] = Field(
        [], description="reasoning.encrypted_content and message.output_text.logprobs; others are not there."
    )
    metadata: dict[str, str] = Field({}, max_length=MAX_METADATA, description="Comes back with the answer.")
    store: bool | None = Field(None, description="Nothing is stored, whatever this says.")
    previous_response_id: Any = Field(None, description="Refused: no answer is stored.")
    conversation: Any = Field(None, description="Refused: no conversation is stored.")
    background: bool = Field(False, description="true is refused: no answer is stored.")

    def given(self) -> dict[str, Any]:
        """`text.format` and `max_output_tokens` are under the names that chats have for them."""
        fields = super().given()
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = min(self.max_output_tokens, MAX_INT)
        if (shape := self.text.format) is not None:
            fields["response_format"] = _response_format(shape)
        return fields


def _response_format(shape: TextFormat) -> dict[str, Any]:
    given = shape.model_extra or {}
    if shape.type != "json_schema":
        return {"type": shape.type}
    schema = {"schema": given["schema"]} if "schema" in given else {}
    return {"type": "json_schema", "json_schema": {"strict": shape.strict, **schema}}
