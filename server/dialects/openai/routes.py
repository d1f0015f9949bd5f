"""The OpenAI API: models, chat completions, completions."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request, Response

from tightrope import __version__
from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.types import GenerateRequest, PromptInfo, TextPrompt
from tightrope.server.answering import Choice, collect, started
from tightrope.server.deltas.one_token import one_token_each
from tightrope.server.deltas.side_by_side import run
from tightrope.server.dialects.openai.answers import (
    ChatAnswer,
    CompletionAnswer,
    ModelCard,
    ModelList,
    chat_choice,
    completion_choice,
    usage,
)
from tightrope.server.dialects.openai.call_format import takes_tools, with_tool_text
from tightrope.server.dialects.openai.convert import chat_request, check_chat, completion_requests, fields_overruled
from tightrope.server.dialects.openai.messages import template_messages, template_variables
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest, SamplingBody
from tightrope.server.dialects.openai.stream import Identity, chat_events, completion_events
from tightrope.server.dialects.openai.tools import may_call, tool_use
from tightrope.server.fields.explain import Explanation, explain
from tightrope.server.http.body import JsonRoute, log_ignored, unread_fields
from tightrope.server.http.error_docs import ERRORS
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.sse import event_stream
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.served import Served, check_model
from tightrope.server.state import AppState

EVENTS = {
    "text/event-stream": {
        "example": 'data: {"id": "...", "choices": [...]}\n\ndata: [DONE]\n\n',
    }
}


def openai_router(front: AppState) -> APIRouter:
    """All routes, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    def card(adapter: str | None = None) -> ModelCard:
        served = front.served()
        return ModelCard(
            id=served.model_id if adapter is None else adapter,
            object="model",
            created=front.started,
            owned_by="tightrope",
            root=served.info.model_id if adapter is None else served.adapters[adapter],
            parent=None if adapter is None else served.model_id,
            max_model_len=served.info.max_model_len,
        )

    @router.get("/models", responses={k: ERRORS[k] for k in (401, 503)})
    async def models() -> ModelList:
        """The served model and its adapters."""
        return ModelList(object="list", data=[card(), *map(card, front.served().adapters)])

    @router.get("/models/{model:path}", responses={k: ERRORS[k] for k in (401, 404, 503, "default")})
    async def model(model: str) -> ModelCard:
        """One model; its name may contain slashes."""
        served = front.served()
        return card(check_model(model, served))

    @router.post(
        "/chat/completions",
        response_model=None,
        responses={
            **ERRORS,
            200: {"model": ChatAnswer, "content": EVENTS, "description": "The answer, whole or as events."},
        },
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await answer_chat(front, body, request)

    @router.post(
        "/completions",
        response_model=None,
        responses={
            **ERRORS,
            200: {"model": CompletionAnswer, "content": EVENTS, "description": "The text, whole or as events."},
        },
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        return await answer_completion(front, body, request)

    return router


async def answer_chat(front: AppState, body: ChatRequest, request: Request) -> Response:
    """The reply to a chat, whole or as events. Raises EngineError while a status can still be chosen."""
    served = front.served()
    check_chat(body, served)
    identity = _identity("chatcmpl", body.model, served)
    prompt = await rendered_chat(front, body, request)
    template = front.template()
    tools = tool_use(body, template.source_for(has_tools=may_call(body)))
    engine_request = chat_request(body, identity.id, prompt.spans, template.stops, served, tools)
    log_ignored(f"request_id={identity.id}", lambda: (name for name, _ in fields_overruled(body, served)))
    explanation = await _explanation(front, body, [engine_request], request, prompt.notes)
    try:
        if body.stream:
            deltas = await started(request, run(front.generate_for(request), [engine_request]))
            events = chat_events(
                deltas,
                identity,
                wants_logprobs=body.logprobs,
                include_usage=_include_usage(body),
                tools=tools,
                explanation=explanation,
            )
            return event_stream(events, "openai")
        choices = await collect(request, run(front.generate_for(request), [engine_request]))
    except ContextLengthExceeded as exc:
        exc.param = "messages"
        raise
    return _whole(
        identity,
        "chat.completion",
        [chat_choice(index, choice, body, tools) for index, choice in enumerate(choices)],
        [choices[0].prompt],
        sum(choice.finish.num_tokens for choice in choices),
        explanation,
    )


async def answer_completion(front: AppState, body: CompletionRequest, request: Request) -> Response:
    """The reply to one or several prompts, whole or as events. Raises EngineError while a status can be chosen."""
    served = front.served()
    identity = _identity("cmpl", body.model, served)
    requests = completion_requests(body, identity.id, served)
    log_ignored(f"request_id={identity.id}", lambda: (name for name, _ in fields_overruled(body, served)))
    explanation = await _explanation(front, body, requests, request)
    echoes = await or_gone(request, _prompt_texts(front, requests)) if body.echo else []
    if body.stream:
        deltas = await started(request, run(front.generate_for(request), requests))
        events = completion_events(
            deltas if body.logprobs is None else one_token_each(deltas),
            identity,
            echoes=echoes,
            n=body.n,
            wants_logprobs=body.logprobs is not None,
            include_usage=_include_usage(body),
            explanation=explanation,
        )
        return event_stream(events, "openai")
    choices = await collect(request, run(front.generate_for(request), requests))
    best_of = requests[0].n
    answers: list[dict[str, Any]] = []
    for position in range(len(requests)):
        best = _best(choices[position * best_of : (position + 1) * best_of], body.n)
        for choice in best:
            echo = echoes[position] if body.echo else None
            answers.append(completion_choice(len(answers), choice, echo, body))
    return _whole(
        identity,
        "text_completion",
        answers,
        [choice.prompt for choice in choices[::best_of]],
        sum(choice.finish.num_tokens for choice in choices),
        explanation,
    )


async def rendered_chat(front: AppState, body: ChatRequest, request: Request) -> RenderedPrompt:
    """The prompt of a chat by the template in use. Raises InvalidRequest, TemplateFailed and ClientGone."""
    opens_turn = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    template = front.template()
    source = template.source_for(has_tools=may_call(body))
    if body.documents and "documents" not in source:
        raise InvalidRequest("documents: the chat template has no place for them", "documents")
    messages, tools = template_messages(body.messages), tool_use(body, source)
    shown = [] if tools is None else tools.shown
    if not takes_tools(source):
        messages, shown = with_tool_text(messages, shown), []
    rendering = template.render(
        front.renderer,
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=body.continue_final_message,
        variables=template_variables(body),
        tools=shown,
        documents=body.documents or (),
    )
    return await or_gone(request, rendering)


async def _prompt_texts(front: AppState, requests: Sequence[GenerateRequest]) -> list[str]:
    """The prompts as text, for echo."""

    async def text(request: GenerateRequest) -> str:
        if isinstance(request.prompt, TextPrompt):
            return "".join(span.text for span in request.prompt.spans)
        return await front.client.detokenize(request.prompt.token_ids, request.adapter)

    return list(await asyncio.gather(*map(text, requests)))


def _best(choices: Sequence[Choice], n: int) -> Sequence[Choice]:
    """The n choices whose tokens are likeliest on the average, when there are more."""
    return choices if len(choices) == n else sorted(choices, key=Choice.mean_logprob, reverse=True)[:n]


def _include_usage(body: SamplingBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _identity(prefix: str, name: str | None, served: Served) -> Identity:
    model = check_model(name, served) or served.model_id
    return Identity(f"{prefix}-{uuid4().hex}", int(time.time()), model, f"tightrope-{__version__}")


async def _explanation(
    front: AppState,
    body: SamplingBody,
    requests: Sequence[GenerateRequest],
    request: Request,
    notes: tuple[str, ...] = (),
) -> Explanation | None:
    if not body.explain:
        return None
    ignored = [*unread_fields(body), *fields_overruled(body, front.served())]
    return await explain(front, requests, ignored, request, notes)


def _whole(
    identity: Identity,
    kind: str,
    choices: list[dict[str, Any]],
    prompts: Sequence[PromptInfo],
    num_tokens: int,
    explanation: Explanation | None,
) -> Response:
    answer = {
        "id": identity.id,
        "object": kind,
        "created": identity.created,
        "model": identity.model,
        "system_fingerprint": identity.system_fingerprint,
        "choices": choices,
        "usage": usage(prompts, num_tokens),
    }
    if explanation is not None:
        answer["explain"] = explanation.told(dict(enumerate(prompts)))
    return Response(msgspec.json.encode(answer), media_type="application/json")
