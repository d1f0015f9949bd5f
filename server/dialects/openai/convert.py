"""From OpenAI bodies to engine requests: what can't be honoured is refused here, with the field's name."""

from collections.abc import Sequence

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import (
    GenerateRequest,
    Grammar,
    LogprobRequest,
    ModelInfo,
    Prompt,
    Span,
    TextPrompt,
    TokenPrompt,
)
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest, SamplingBody
from tightrope.server.dialects.openai.tools import ToolUse, check_tools
from tightrope.server.fields.lost_fields import idle_scale
from tightrope.server.fields.sampling import KNOWN, Ignored, Sampling, read_sampling
from tightrope.server.fields.structured import overruled, read_grammar
from tightrope.server.served import Served, check_model, check_most

MOST_TOKEN_IDS = 1 << 24  # more than any vocabulary has


def check_supported(body: SamplingBody) -> None:
    """Refuse fields that only mean something together with others."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs can't be streamed; leave stream out", "prompt_logprobs")


def sampling(body: SamplingBody, info: ModelInfo, max_tokens: int | None, more_stops: Sequence[str] = ()) -> Sampling:
    """How the body wants tokens drawn and when the answer ends; `more_stops` are those of the prompt format."""
    typed = {name: getattr(body, name) for name in body.model_fields_set & KNOWN}
    return read_sampling(
        typed | (body.model_extra or {}), info.vocab_size, max_tokens=max_tokens, more_stops=more_stops
    )


def answer_grammar(body: SamplingBody) -> Grammar | None:
    """What the body wants the answer to look like."""
    given = dict(body.model_extra or {})
    if body.response_format is not None:
        given["response_format"] = body.response_format.model_dump(exclude_unset=True)
    return read_grammar(given)


def fields_overruled(body: SamplingBody, served: Served) -> list[Ignored]:
    """The fields of a valid body that are read here, and change nothing beside others, and why."""
    ignored = [*sampling(body, served.info, None).ignored, *overruled(body.model_extra or {})]
    ignored += idle_scale(body.adapter_scale, check_model(body.model, served))
    forces_call = isinstance(body, ChatRequest) and body.tools and body.tool_choice not in (None, "none", "auto")
    if forces_call and answer_grammar(body) is not None:
        ignored.append(("response_format", "tool_choice forces a call, which goes before it"))
    return ignored


def check_chat(body: ChatRequest, served: Served) -> None:
    """All that can be refused before the template is rendered."""
    check_model(body.model, served)
    check_supported(body)
    check_tools(body)
    check_most("n", body.n, served.limits.max_best_of)
    check_most("prompt_logprobs", body.prompt_logprobs or 0, served.limits.max_logprobs)
    if body.top_logprobs is not None:
        check_most("top_logprobs", body.top_logprobs, served.limits.max_logprobs)
        if body.top_logprobs > 0 and not body.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt can't both be true", "continue_final_message"
        )


def _chat_grammar(body: ChatRequest, tools: ToolUse | None) -> Grammar | None:
    """The grammar of a chat's answer. A response_format speaks of text, so a forced call goes before it."""
    asked = answer_grammar(body)
    if tools is None:
        return asked
    if tools.is_forced and asked is not None and asked.field != "response_format":
        raise InvalidRequest(f"{asked.field} and a tool_choice that forces a call exclude each other", asked.field)
    return tools.grammar if tools.is_forced or asked is None else asked


def chat_request(
    body: ChatRequest,
    request_id: str,
    spans: tuple[Span, ...],
    format_stops: Sequence[str],
    served: Served,
    tools: ToolUse | None = None,
) -> GenerateRequest:
    """The engine's request for a chat whose prompt is rendered."""
    more_stops = [*format_stops, *(() if tools is None else tools.stops)]
    asked = sampling(body, served.info, None, more_stops)
    return GenerateRequest(
        request_id=request_id,
        prompt=TextPrompt(spans, body.add_special_tokens),
        sampling=asked.params,
        stop=asked.stop,
        guidance=asked.guidance,
        grammar=_chat_grammar(body, tools),
        n=body.n,
        logprobs=LogprobRequest(processed=False, top=body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        truncate_to=body.truncate_prompt_tokens,
        skip_special_tokens=body.skip_special_tokens,
        namespace=body.cache_salt or "",
        adapter=check_model(body.model, served),
        adapter_scale=body.adapter_scale,
    )


def completion_requests(body: CompletionRequest, request_id: str, served: Served) -> list[GenerateRequest]:
    """One engine request for each prompt of the batch."""
    adapter = check_model(body.model, served)
    check_supported(body)
    best_of = body.n if body.best_of is None else body.best_of
    if best_of < body.n:
        raise InvalidRequest(f"best_of must not be below n ({body.n})", "best_of")
    check_most("n", body.n, served.limits.max_best_of)
    check_most("best_of", best_of, served.limits.max_best_of)
    if body.stream and best_of > body.n:
        raise InvalidRequest("best_of above n can't be streamed", "best_of")
    if body.suffix:
        raise InvalidRequest("suffix needs a model that fills in the middle, which this one does not", "suffix")
    if body.logprobs is not None:
        check_most("logprobs", body.logprobs, served.limits.max_logprobs)
    check_most("prompt_logprobs", body.prompt_logprobs or 0, served.limits.max_logprobs)
    scored = [body.prompt_logprobs, body.logprobs if body.echo else None]  # alternatives at each token of the prompt
    prompts = completion_prompts(body, served)
    asked = sampling(body, served.info, body.max_tokens)
    grammar = answer_grammar(body)
    wants_scores = body.logprobs is not None or best_of > body.n
    return [
        GenerateRequest(
            request_id=f"{request_id}-{position}",
            prompt=prompt,
            sampling=asked.params,
            stop=asked.stop,
            guidance=asked.guidance,
            grammar=grammar,
            n=best_of,
            logprobs=LogprobRequest(processed=False, top=body.logprobs or 0) if wants_scores else None,
            prompt_logprobs=max((top for top in scored if top is not None), default=None),
            truncate_to=body.truncate_prompt_tokens,
            skip_special_tokens=body.skip_special_tokens,
            namespace=body.cache_salt or "",
            adapter=adapter,
            adapter_scale=body.adapter_scale,
        )
        for position, prompt in enumerate(prompts)
    ]


def completion_prompts(body: CompletionRequest, served: Served) -> list[Prompt]:
    """The prompts of the batch, each text or token ids. Raises InvalidRequest for empty ones and unknown ids."""
    given = body.prompt
    pieces: list[str | list[int]]
    if isinstance(given, str):
        pieces = [given]
    elif given and all(isinstance(item, int) for item in given):
        pieces = [[item for item in given if isinstance(item, int)]]
    else:
        pieces = [item for item in given if not isinstance(item, int)]
    if not pieces:
        raise InvalidRequest("prompt must not be empty", "prompt")
    check_most("prompt: the number of prompts", len(pieces), served.max_prompts)
    prompts: list[Prompt] = []
    # an adapter may know more tokens than the model; which, the engine tells
    end = served.info.vocab_size if check_model(body.model, served) is None else MOST_TOKEN_IDS
    for piece in pieces:
        if not piece:
            raise InvalidRequest("prompt must not be empty", "prompt")
        if isinstance(piece, str):
            prompts.append(TextPrompt((Span(piece),), body.add_special_tokens and body.add_bos_token))
            continue
        for token_id in piece:
            if not 0 <= token_id < end:
                raise InvalidRequest(f"prompt: {token_id} is no token id below {end}", "prompt")
        prompts.append(TokenPrompt(tuple(piece)))
    return prompts
