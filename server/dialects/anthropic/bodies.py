"""What clients of the Messages API send and get."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from tightrope.server.asking import AnswerBody
from tightrope.server.fields import structured
from tightrope.server.fields.explain import Explained
from tightrope.server.fields.names import KNOWN, api_field
from tightrope.server.http.body import EVERY_NAME, Body, FirstErrorOnly, ShownBody


def _blocks(content: object) -> object:
    """A text is a block of text, and so is one among blocks; one block alone is a list of one; a null is none."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if isinstance(content, dict):
        return [content]
    if isinstance(content, list):
        whole = [block for block in content if block is not None]
        return [{"type": "text", "text": block} if isinstance(block, str) else block for block in whole]
    return content


class TextBlock(Body):
    """A piece of a system message, or of a tool's result: text alone is understood."""

    read_elsewhere = frozenset({"cache_control", "citations"})

    type: str = "text"
    text: str | None = None


Texts = Annotated[list[TextBlock], BeforeValidator(_blocks)]


class ContentBlock(TextBlock):
    """A piece of a message."""

    read_elsewhere = TextBlock.read_elsewhere | {"caller"}

    thinking: str | None = Field(None, description="Of a block of this type.")
    signature: str | None = Field(None, description="Beside it, as this server has given it.")
    data: str | None = Field(None, description="Of redacted thinking, which is left out.")
    id: str | None = Field(None, description="Of a use of a tool.")
    name: str | None = Field(None, description="Of the tool that is used.")
    input: dict[str, Any] | None = Field(None, description="Its arguments.")
    tool_use_id: str | None = Field(None, description="Of a tool's result.")
    content: Texts | None = Field(None, description="A tool's result, text or blocks of text.")
    source: dict[str, Any] | None = Field(None, description="Of a document: plain text, or blocks of text.")
    title: str | None = Field(None, description="Of a document.")
    context: str | None = Field(None, description="Of a document: what else is to be known of it.")
    is_error: bool = Field(False, description="Whether the result is the tool's failure.")


class Turn(Body):
    """One message of the chat."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[ContentBlock], BeforeValidator(_blocks)] = Field(description="Text, or blocks of it.")


class AnthropicTool(ShownBody):
    """A tool that the client runs. There are no others."""

    read_elsewhere = EVERY_NAME

    type: str = "custom"
    name: str | None = Field(None, description="1 to 128 letters, digits and characters of _-./:")
    description: str | None = None
    input_schema: dict[str, Any] | None = Field(None, description="A JSON schema of the tool's arguments.")
    strict: bool | None = Field(None, description="Calls that the model decides on are valid under the schema too.")


class ToolChoice(Body):
    """Whether, and which, tools are to be used."""

    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str | None = Field(None, description="Of the tool that has to be used.")
    disable_parallel_tool_use: bool = Field(False, description="Whether an answer may use one tool alone.")


class Thinking(Body):
    """Whether to think before the answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=0, description="Thoughts end after so many tokens.")
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: thoughts are not shown, and come back by their signature."
    )


class OutputFormat(Body):
    """The shape of the answer."""

    read_elsewhere = frozenset({"schema"})

    type: Literal["json_schema"] = "json_schema"


class OutputConfig(Body):
    """How much work an answer is worth, and its shape."""

    effort: str | None = Field(None, description='How much to think, as the template knows it: "low", "high", ...')
    format: OutputFormat | None = None


class MessagesRequest(AnswerBody):
    """POST /v1/messages."""

    without_effect = frozenset({"metadata"})

    messages: Annotated[list[Turn], FirstErrorOnly()] = Field(min_length=1)
    system: Texts = Field([], description="Text, or blocks of it.")
    max_tokens: int | None = Field(None, ge=-1, description="At most so many, thoughts included.")
    stream: bool = False
    temperature: float = api_field("temperature", "0 is greedy.")
    top_p: float = api_field("top_p")
    top_k: int = api_field("top_k", "0 and -1 are off.")
    stop_sequences: Annotated[list[str | None], FirstErrorOnly()] | None = Field(
        None, description="Texts that end the answer and are cut from it."
    )
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Without it the template decides.")
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = Field(None, description="The older place of output_config.format.")
    metadata: dict[str, Any] | None = None

    def given(self) -> dict[str, Any]:
        """The shape of the answer is under the name that chats have for it."""
        shape = self.output_config.format or self.output_format
        if shape is None:
            return super().given()
        return super().given() | {"response_format": {"type": "json_schema", "json_schema": shape.model_extra or {}}}


class CountTokensRequest(MessagesRequest):
    """POST /v1/messages/count_tokens: how the answer is to be written changes nothing."""

    without_effect = frozenset(
        {*KNOWN, *structured.NAMES, *MessagesRequest.model_fields}
        - {"messages", "system", "tools", "tool_choice", "thinking", "output_config", "model"}
    )


class AnswerBlock(BaseModel):
    """A piece of the answer: its type tells which of the fields are there."""

    type: Literal["text", "thinking", "tool_use"]
    text: str = Field("", description="Of text.")
    thinking: str = Field("", description="Of thinking.")
    signature: str = Field("", description="Of thinking; it isn't checked when it comes back.")
    id: str = Field("", description="Of tool_use.")
    name: str = Field("", description="Of tool_use.")
    input: dict[str, Any] = Field({}, description="Of tool_use.")


class OutputTokensDetails(BaseModel):
    thinking_tokens: int


class MessagesUsage(BaseModel):
    """A prompt has input_tokens and those that were found in the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessagesAnswer(BaseModel):
    """The answer to POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessagesUsage
    explain: Explained = {}


class CountedTokens(BaseModel):
    """The answer to POST /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicFault(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    """Every error of these routes; in a stream it is an event of the name error."""

    type: Literal["error"]
    error: AnthropicFault
