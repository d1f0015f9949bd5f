"""What clients of the Responses API get."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from tightrope.server.fields.explain import Explained

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[dict[str, Any]] = Field(description="Empty unless asked for.")


class OutputMessage(BaseModel):
    """What the reader is told."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A function is called. arguments: a JSON object as text, cut short where the answer is."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class OutputCustomCall(BaseModel):
    """A custom tool is called. input: a text, cut short where the answer is."""

    id: str
    type: Literal["custom_tool_call"]
    status: Status
    call_id: str
    name: str
    input: str


class SummaryText(BaseModel):
    type: Literal["summary_text"]
    text: str


class ThoughtText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    """What the model has thought: as its content, or as its summary where one was asked for."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[SummaryText]
    content: list[ThoughtText] = []
    encrypted_content: str = Field("", description="Absent unless asked for.")


class InputTokensDetails(BaseModel):
    """cached_tokens: found in the cache; moved_tokens: those of them that aren't exactly computed."""

    cached_tokens: int
    moved_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFault(BaseModel):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponsesAnswer(BaseModel):
    """POST /v1/responses. What isn't said of here is as it was in the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputReasoning | OutputMessage | OutputCall | OutputCustomCall]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    background: bool
    store: bool = Field(description="Always false.")
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    explain: Explained = {}


class InputTokens(BaseModel):
    """POST /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"]
    input_tokens: int
