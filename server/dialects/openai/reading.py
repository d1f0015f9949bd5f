"""From OpenAI bodies to what is asked: what can't be honoured is refused here, with the field's name."""

from dataclasses import replace
from typing import Any

from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import LogprobRequest, Prompt, TextPrompt
from tightrope.server.asking import Asked, ask, common
from tightrope.server.chats.messages import bent_messages
from tightrope.server.chats.offers import bent_choice, offer_of
from tightrope.server.chats.rendering import RenderedChat, render_chat
from tightrope.server.chats.tools import bent_tools, check_tools
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest, SamplingBody
from tightrope.server.fields.structured import read_grammar
from tightrope.server.prompts.prompt_formats import FIXED_VARIABLES
from tightrope.server.prompts.raw_prompts import raw_prompt
from tightrope.server.replies.form import Thoughts
from tightrope.server.replies.planning import Wishes
from tightrope.server.served import Served, check_model, check_most
from tightrope.server.state import AppState


def _check_supported(body: SamplingBody) -> None:
    """Refuse fields that only mean something together with others."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs can't be streamed; leave stream out", "prompt_logprobs")


def check_chat(body: ChatRequest, served: Served) -> None:
    """All that can be refused before the template is rendered."""
    check_model(body.model, served, is_openai=True)
    _check_supported(body)
    check_tools(offer_of(body))
    check_most("n", body.n, served.limits.max_best_of)
    check_most("prompt_logprobs", body.prompt_logprobs, served.limits.max_logprobs)
    check_most("top_logprobs", body.top_logprobs, served.limits.max_logprobs)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt can't both be true", "continue_final_message"
        )


def chat_asked(body: ChatRequest, chat: RenderedChat, served: Served) -> Asked:
    """What a checked chat asks for, once its prompt is rendered."""
    prompt, tools = chat.prompt, chat.tools
    is_overruled = tools is not None and tools.is_forced and read_grammar(body.given()) is not None
    read = replace(
        common(body, served, is_openai=True),
        is_stream=body.stream,
        stops=chat.all_stops,
        n=body.n,
        logprobs=LogprobRequest(processed=False, top=body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        shape=chat.grammar,
        shown_tokens=chat.plan.marks,
        ignored=[
            *([("response_format", "tool_choice forces a call, which goes before it")] if is_overruled else []),
            *([("tool_choice", "no tools came")] if body.tool_choice and not body.tools else []),
            *chat.ignored,
        ],
        notes=prompt.notes,
    )
    bent = [*bent_messages(body.messages), *body.older, *bent_tools(body.tools or ()), *bent_choice(body.tool_choice)]
    read = replace(read, bent=[*read.bent, *bent] if body.explain else ())
    return ask("chatcmpl", [TextPrompt(prompt.spans, body.add_special_tokens)], read, served)


def template_variables(body: ChatRequest) -> dict[str, Any]:
    """The request's own variables for the template. Raises InvalidRequest for names that the server sets."""
    variables: dict[str, Any] = {}
    for name in ("template_vars", "chat_template_kwargs"):
        given: dict[str, Any] = getattr(body, name) or {}
        if taken := sorted(FIXED_VARIABLES & given.keys()):
            raise InvalidRequest(f"{name} must not set {taken[0]}", name)
        variables |= given
    return variables


def completion_asked(body: CompletionRequest, served: Served) -> Asked:
    """What one or several prompts ask for."""
    check_model(body.model, served, is_openai=True)
    _check_supported(body)
    best_of = body.n if body.best_of is None else body.best_of
    if best_of < body.n:
        raise InvalidRequest(f"best_of must not be below n ({body.n})", "best_of")
    check_most("n", body.n, served.limits.max_best_of)
    check_most("best_of", best_of, served.limits.max_best_of)
    if body.stream and best_of > body.n:
        raise InvalidRequest("best_of above n can't be streamed", "best_of")
    if body.suffix:
        raise InvalidRequest("suffix needs a model that fills in the middle, which this one does not", "suffix")
    check_most("logprobs", body.logprobs, served.limits.max_logprobs)
    check_most("prompt_logprobs", body.prompt_logprobs, served.limits.max_logprobs)
    # So many alternatives are wanted at each token of the prompt.
    scored = [body.prompt_logprobs, body.logprobs if body.echo else None]
    wants_scores = body.logprobs is not None or best_of > body.n
    read = replace(
        common(body, served, is_openai=True),
        is_stream=body.stream,
        max_tokens=body.max_tokens,
        n=best_of,
        logprobs=LogprobRequest(processed=False, top=body.logprobs or 0) if wants_scores else None,
        prompt_logprobs=max((top for top in scored if top is not None), default=None),
    )
    return ask("cmpl", _prompts(body, served, read.adapter), read, served)


def _prompts(body: CompletionRequest, served: Served, adapter: str | None) -> list[Prompt]:
    """The prompts of the batch, each text or token ids."""
    given: Any = body.prompt  # Its types are checked: text, token ids, or a list of either.
    pieces = [given] if isinstance(given, str) or isinstance(next(iter(given), None), int) else given
    if not pieces:
        raise InvalidRequest("prompt must not be empty", "prompt")
    check_most("prompt: the number of prompts", len(pieces), served.max_prompts)
    add_bos = body.add_special_tokens and body.add_bos_token
    return [raw_prompt(piece, served, adapter, add_bos=add_bos) for piece in pieces]


async def rendered_chat(front: AppState, body: ChatRequest, request: Request) -> RenderedChat:
    """The chat's prompt by the template in use. Raises InvalidRequest, TemplateFailed and ClientGone."""
    opens_turn = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    return await render_chat(
        front,
        request,
        body.messages,
        offer_of(body),
        opens_turn=opens_turn,
        continues=body.continue_final_message,
        variables=template_variables(body),
        documents=body.documents or (),
        wishes=_wishes(body),
        has_grammar=read_grammar(body.given()) is not None,
        adapter=check_model(body.model, front.served(), is_openai=True),
    )


def _wishes(body: ChatRequest) -> Wishes:
    """What a chat says of thoughts."""
    budget = body.thinking_budget if body.thinking_token_budget is None else body.thinking_token_budget
    shown: Thoughts = "apart" if body.include_reasoning else "dropped"
    return Wishes(
        "in the text" if body.reasoning_format == "none" else shown,
        body.reasoning_effort,
        body.enable_thinking,
        None if budget == -1 else budget,
    )
