"""What clients of the OpenAI API get: the whole answers, and the parts that streams share with them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tightrope.engine.types import Finish, PromptInfo, Token
from tightrope.server.fields.explain import Explained
from tightrope.server.fields.logprobs import finite, listed, token_name
from tightrope.server.replies.events import Call
from tightrope.server.replies.form import ReplyPlan

FinishReason = Literal["stop", "length", "tool_calls", "function_call", "error"]


class PromptTokensDetails(BaseModel):
    """cached_tokens: of the prompt, found in the cache; moved_tokens: those of them that aren't exactly computed."""

    cached_tokens: int
    moved_tokens: int


class Usage(BaseModel):
    """Tokens over all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Raw log probabilities of an answer's tokens, the end token included."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Four lists of one length. The first echoed token has null in two of them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """rank: place among the likeliest, null for a token beyond those listed."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None], Field(description="Absent unless asked for; token ids are the keys.")
]


class CalledFunction(BaseModel):
    """arguments: a JSON object as text, cut short where the answer is."""

    name: str
    arguments: str


class MadeCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledTool(BaseModel):
    """input: a text, cut short where the answer is."""

    name: str
    input: str


class MadeCustomCall(BaseModel):
    """A custom tool is called."""

    id: str
    type: Literal["custom"]
    custom: CalledTool


class ChatMessage(BaseModel):
    """content: null beside calls without text. The others are absent where there are none."""

    role: Literal["assistant"]
    reasoning_content: str = Field("", description="What the model has thought before.")
    content: str | None
    tool_calls: list[MadeCall | MadeCustomCall] = []
    function_call: CalledFunction | None = Field(None, description="The call, where `functions` were asked for.")


TokenIds = Annotated[list[int], Field(description="Absent unless return_token_ids asks for it.")]


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs = []
    token_ids: TokenIds = []


class ChatAnswer(BaseModel):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: TokenIds = []
    explain: Explained = {}


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs = []
    prompt_token_ids: TokenIds = []
    token_ids: TokenIds = []


class CompletionAnswer(BaseModel):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    explain: Explained = {}


class ModelStatus(BaseModel):
    """Whether the model is in memory; llama.cpp's server has it, too."""

    value: Literal["unloaded", "loading", "loaded", "failed"]
    failed: bool = False
    message: str = Field("", description="Why it could not be loaded.")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None = Field(description="In tokens; null where it has not been loaded yet.")
    status: ModelStatus


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


def finish_reason(finish: Finish, num_calls: int = 0, *, is_older: bool = False) -> FinishReason:
    """OpenAI's word for an end. is_older: calls are told as those of functions."""
    if finish.reason in ("length", "error"):
        return "length" if finish.reason == "length" else "error"
    if not num_calls:
        return "stop"
    return "function_call" if is_older else "tool_calls"


def stop_reason(finish: Finish) -> str | int | None:
    """The stop string, or the id of a token that the client named; what went wrong with an error."""
    if finish.reason == "error":
        return finish.message
    return finish.matched if finish.reason in ("stop_string", "stop_token") else None


def usage(prompts: Sequence[PromptInfo], completion_tokens: int) -> dict[str, Any]:
    """Usage over all prompts (one PromptInfo each) and all choices."""
    prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(prompt.num_cached for prompt in prompts),
            "moved_tokens": sum(prompt.num_moved for prompt in prompts),
        },
    }


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """The chat form."""
    return {"content": listed(tokens), "refusal": None}


def completion_logprobs(tokens: Sequence[Token], offset: int = 0) -> dict[str, Any]:
    """The completions form; `offset` is the place of the first of `tokens` in the text.

    Each dict of alternatives holds the chosen token too, with the very same float.
    """
    offsets = []
    for token in tokens:
        offsets.append(max(0, offset))
        offset += len(token.text)
    return {
        "tokens": [token_name(token.raw) for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {token_name(top.raw): finite(top.logprob) for top in token.top}
            | {token_name(token.raw): finite(token.logprob)}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def echo_offset(echo: str, echoed: Sequence[Token]) -> int:
    """Where the prompt's tokens begin in its text: before it, if a BOS was put in front that the text doesn't have."""
    return len(echo) - sum(len(token.text) for token in echoed)


def prompt_logprobs(tokens: Sequence[Token], top: int) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token of the prompt its own entry and those of the `top` likeliest, by token id.

    The first token has null. `rank` is the place among the likeliest, null for a token beyond those listed.
    """
    listed: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            listed.append(None)
            continue
        ranks = {other.token_id: rank for rank, other in enumerate(token.top, 1)}
        chosen = {token.token_id: (token.raw, token.logprob)}
        others = {other.token_id: (other.raw, other.logprob) for other in token.top[:top]}
        listed.append(
            {
                str(token_id): {
                    "logprob": finite(logprob),
                    "rank": ranks.get(token_id),
                    "decoded_token": token_name(raw),
                }
                for token_id, (raw, logprob) in (others | chosen).items()
            }
        )
    return listed


def chat_message(text: str, plan: ReplyPlan, *, is_cut: bool, is_older: bool) -> dict[str, Any]:
    """The assistant's message, with the thoughts and calls that are in its text.

    is_cut: it had more to say; is_older: its one call is told as that of a function.
    """
    reply = plan.whole(text, is_cut=is_cut)
    message: dict[str, Any] = {"role": "assistant"}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    if not reply.calls:
        return {**message, "content": reply.content}
    made = [_made(call) for call in reply.calls]
    calls = {"function_call": made[0]["function"]} if is_older else {"tool_calls": made}
    return {**message, "content": reply.content or None, **calls}


def _made(call: Call) -> dict[str, Any]:
    if call.is_custom:
        return {"id": call.call_id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def is_cut(finish: Finish) -> bool:
    """Whether the model had more to say."""
    return finish.reason in ("length", "error")
