"""The TGI API: generate, whole and streamed, and what the model is."""

import time

import msgspec
from fastapi import APIRouter, Request, Response

from tightrope import __version__
from tightrope.engine.errors import InvalidRequest
from tightrope.server.answering import Choice, collect, started
from tightrope.server.deltas.side_by_side import run
from tightrope.server.dialects.tgi.answers import Asked, answer_events, answer_headers, answer_json, stream_headers
from tightrope.server.dialects.tgi.convert import TGILimits, generate_request, is_sampled, refusal
from tightrope.server.dialects.tgi.requests import CompatBody, GenerateAnswer, GenerateBody, Info
from tightrope.server.fields.explain import explain
from tightrope.server.fields.lost_fields import idle_scale
from tightrope.server.http.body import JsonRoute, log_ignored, unread_fields
from tightrope.server.http.error_docs import TGI_ERRORS
from tightrope.server.http.sse import event_stream
from tightrope.server.state import AppState

EVENTS = {"text/event-stream": {"example": 'data: {"index": 1, "token": {...}, ...}\n\n'}}


def tgi_router(front: AppState) -> APIRouter:
    """POST /generate, /generate_stream and /; GET /info."""
    router = APIRouter(route_class=JsonRoute, tags=["TGI"])
    settings = front.settings

    @router.post(
        "/generate",
        response_model=None,
        responses={**TGI_ERRORS, 200: {"model": GenerateAnswer, "description": "The answer."}},
    )
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Write an answer."""
        wanted = await _asked(front, body, request, is_stream=False)
        return await _whole(front, body, request, wanted, as_list=False)

    @router.post(
        "/generate_stream",
        response_model=None,
        responses={**TGI_ERRORS, 200: {"content": EVENTS, "description": "One event per token."}},
    )
    async def generate_stream(body: GenerateBody, request: Request) -> Response:
        """Write an answer, token by token."""
        return await _streamed(front, body, request, await _asked(front, body, request, is_stream=True))

    @router.post(
        "/",
        response_model=None,
        responses={
            **TGI_ERRORS,
            200: {"model": list[GenerateAnswer], "content": EVENTS, "description": "The answer, in a list."},
        },
    )
    async def compat_generate(body: CompatBody, request: Request) -> Response:
        """Write an answer, whole or token by token; the input comes in front of it unless return_full_text is false."""
        return await answer_compat(front, body, request)

    @router.get("/info", responses={424: TGI_ERRORS[424]})
    async def info() -> Info:
        """The model and its limits."""
        served = front.served()
        limits = TGILimits.of(served.info, settings, served.adapters)
        return Info(
            model_id=served.model_id,
            model_sha=None,
            model_dtype=served.info.format,
            model_device_type=_compute_type(front),
            model_pipeline_tag="text-generation",
            max_concurrent_requests=served.limits.max_waiting + served.info.max_num_seqs,
            max_best_of=limits.max_best_of,
            max_stop_sequences=limits.max_stop_sequences,
            max_input_tokens=limits.max_input_tokens,
            max_input_length=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            max_batch_total_tokens=served.info.cache_tokens,
            validation_workers=1,
            max_client_batch_size=served.max_prompts,
            router="tightrope",
            version=__version__,
            sha=None,
            docker_label=None,
        )

    return router


async def answer_compat(front: AppState, body: CompatBody, request: Request) -> Response:
    """The reply of POST /: a list of one answer, or events. Raises EngineError while a status can still be chosen."""
    wanted = await _asked(front, body, request, is_stream=body.stream, full_text_default=True)
    if body.stream:
        return await _streamed(front, body, request, wanted)
    return await _whole(front, body, request, wanted, as_list=True)


def _compute_type(front: AppState) -> str:
    return "gpu" if front.settings.engine.model.gpu_layers else "cpu"


async def _asked(
    front: AppState, body: GenerateBody, request: Request, *, is_stream: bool, full_text_default: bool = False
) -> Asked:
    p = body.parameters
    served = front.served()
    limits = TGILimits.of(served.info, front.settings, served.adapters)
    asked = generate_request(body.inputs, p, limits, model=body.model, is_stream=is_stream)
    ignored = idle_scale(asked.adapter_scale, asked.adapter)
    if body.model not in (None, asked.adapter, served.model_id):
        ignored.append(("model", "adapter_id counts" if asked.adapter else "no adapter has this name"))
    log_ignored(f"request_id={asked.request_id}", lambda: (name for name, _ in ignored))
    is_full = full_text_default if p is None or p.return_full_text is None else p.return_full_text
    return Asked(
        asked,
        details=p is not None and (p.details or p.decoder_input_details),
        full_text=body.inputs if is_full else "",
        is_sampled=is_sampled(p),
        explanation=await explain(front, [asked], unread_fields(body) + ignored, request) if body.explain else None,
    )


async def _whole(front: AppState, body: GenerateBody, request: Request, wanted: Asked, *, as_list: bool) -> Response:
    arrived_s = time.monotonic()
    try:
        choices = await collect(request, run(front.generate_for(request), [wanted.request]))
    except InvalidRequest as exc:
        raise refusal(exc, wanted.request.stop.max_tokens) from None
    choices.sort(key=Choice.mean_logprob, reverse=True)
    answer = answer_json(choices, wanted)
    return Response(
        msgspec.json.encode([answer] if as_list else answer),
        headers=answer_headers(body.inputs, _compute_type(front), choices[0], arrived_s),
        media_type="application/json",
    )


async def _streamed(front: AppState, body: GenerateBody, request: Request, wanted: Asked) -> Response:
    try:
        deltas = await started(request, run(front.generate_for(request), [wanted.request]))
    except InvalidRequest as exc:
        raise refusal(exc, wanted.request.stop.max_tokens) from None
    return event_stream(answer_events(deltas, wanted), "tgi", stream_headers(body.inputs, _compute_type(front)))
