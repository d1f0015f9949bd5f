"""What clients of the OpenAI API send.

The sampling fields here are those that our API page shows; server/fields/sampling.py reads them and their many
siblings. Other fields are refused, or ignored and listed.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from tightrope.server.asking import AnswerBody
from tightrope.server.chats.custom_tools import tool_in_chats
from tightrope.server.chats.older_calls import with_tools
from tightrope.server.chats.requests import Message, Tool
from tightrope.server.fields.names import Bent, api_field
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, FirstErrorOnly
from tightrope.server.http.token_ids import Ids

Bias = dict[str, float | bool | None] | list[Annotated[list[float | bool], Field(min_length=2, max_length=2)]]


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = Field(False, description="One last chunk with the usage and no choices.")


class ResponseFormat(Body):
    """The shape of the answer."""

    read_elsewhere = frozenset({"schema"})  # llama.cpp has the schema of a json_object here.

    type: Literal["text", "json_object", "json_schema", "json", "regex"] = "text"
    json_schema: dict[str, Any] | None = Field(None, description='{"name": ..., "schema": ...}; always enforced.')
    value: Any = Field(None, description="TGI's place for a JSON schema, or for a regular expression.")


class SamplingBody(AnswerBody):
    """What both kinds of request have in common."""

    n: int = Field(1, ge=1, description="Answers to each prompt.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str | None], FirstErrorOnly()] | None = Field(
        None, description="Texts that end the answer and are cut from it."
    )
    temperature: float = api_field("temperature", "0 is greedy.")
    top_p: float = api_field("top_p")
    top_k: int = api_field("top_k", "0 and -1 are off.")
    min_p: float = api_field("min_p")
    typical_p: float = api_field("typical_p")
    repetition_penalty: float = api_field("repetition_penalty", "Over prompt and answer, once per token id.")
    presence_penalty: float = api_field("presence_penalty")
    frequency_penalty: float = api_field("frequency_penalty")
    logit_bias: Bias | None = Field(None, description='{"token id": -100 to 100}; -100 and false ban.')
    seed: int | None = api_field("seed", "The same seed gives the same text; -1 is random.")
    min_tokens: int = Field(0, ge=0, le=MAX_INT, description="Ends are held back until then.")
    ignore_eos: bool = Field(False, description="Write on to max_tokens.")
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool = False
    response_format: ResponseFormat | None = None
    prompt_logprobs: int | None = Field(
        None, ge=0, description="Score the prompt's tokens too, with that many alternatives; not in streams."
    )

    return_token_ids: bool = Field(False, description="List the token ids of the prompt and of each answer.")

    def given(self) -> dict[str, Any]:
        shape = self.response_format
        return super().given() | ({} if shape is None else {"response_format": shape.model_dump(exclude_unset=True)})


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=-1, description="At most so many; -1, and the default: to the end of the window."
    )
    max_tokens: int | None = Field(None, ge=-1, description="The older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, description="Alternatives at each token.")
    add_generation_prompt: bool | None = Field(None, description="Open a new turn of the assistant; default true.")
    continue_final_message: bool = Field(False, description="Write on inside the last message.")
    add_special_tokens: bool = Field(True, description="BOS in front where the model wants one and none is there.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    template_vars: dict[str, Any] | None = Field(None, description="The same, beneath chat_template_kwargs.")
    reasoning_effort: str | None = Field(
        None,
        description='How much to think, as the template knows it: "low", "high" and the like; "none" is not at all.',
    )
    enable_thinking: bool | None = Field(None, description="Whether to think; it counts more than reasoning_effort.")
    thinking_token_budget: int | None = Field(
        None, ge=-1, le=MAX_INT, description="Thoughts end after so many tokens; -1 is no limit, and 0 no thoughts."
    )
    thinking_budget: int | None = Field(None, ge=-1, le=MAX_INT, description="The same, beneath thinking_token_budget.")
    include_reasoning: bool = Field(True, description="Whether the answer tells its thoughts.")
    reasoning_format: Literal["auto", "deepseek", "none"] = Field(
        "auto", description='"none" leaves thoughts in the content, as the model writes them.'
    )
    documents: list[dict[str, Any]] | None = Field(None, description="For templates that write them into the prompt.")
    tools: list[Annotated[Tool, BeforeValidator(tool_in_chats)]] | None = None
    tool_choice: str | dict[str, Any] | None = Field(
        None, description='"none", "auto", "required" or {"type": "function", "function": {"name": ...}}.'
    )
    parallel_tool_calls: bool = Field(True, description="Whether one answer may hold several calls.")

    _older: Sequence[Bent] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _with_tools(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        placed, older = with_tools(data)
        made = handler(placed)
        made._older = older
        return made

    @property
    def older(self) -> Sequence[Bent]:
        """The fields of functions that came for those of tools; where there are any, a call is told as theirs."""
        return self._older


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], FirstErrorOnly()] | Ids | Annotated[list[Ids], FirstErrorOnly()] = Field(
        description="Text, token ids, or a list of either."
    )
    max_tokens: int = Field(16, ge=-1, description="At most so many; -1: to the end of the window.")
    best_of: int | None = Field(None, ge=1, description="Answers written, of which the n best are given.")
    echo: bool = Field(False, description="Put the prompt in front of the text.")
    logprobs: int | None = Field(None, ge=0, description="Alternatives at each token, besides the chosen one.")
    suffix: str | None = None
    add_special_tokens: bool = Field(True, description="BOS in front of text where the model wants one.")
    add_bos_token: bool = Field(True, description="The same; no BOS is added unless both are true.")
