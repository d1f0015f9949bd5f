"""The TGI API: generate, whole and streamed, and what the model is."""

from fastapi import APIRouter, Request, Response

from tightrope import __version__
from tightrope.server.answering import answer
from tightrope.server.dialects.tgi.reading import TGILimits
from tightrope.server.dialects.tgi.requests import CompatBody, GenerateAnswer, GenerateBody, Info
from tightrope.server.dialects.tgi.writing import Compat, Generate, GenerateStream, compute_type
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import TGI_ERRORS, written
from tightrope.server.state import AppState

EVENTS = {"text/event-stream": {"example": 'data: {"index": 1, "token": {...}, ...}\n\n'}}


def tgi_router(front: AppState) -> APIRouter:
    """POST /generate, /generate_stream and /; GET /info."""
    router = APIRouter(route_class=JsonRoute, tags=["TGI"])
    settings = front.settings

    @router.post("/generate", **written(TGI_ERRORS, model=GenerateAnswer, description="The answer."))
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Write an answer."""
        return await answer(front, Generate, body, request)

    @router.post("/generate_stream", **written(TGI_ERRORS, content=EVENTS, description="One event per token."))
    async def generate_stream(body: GenerateBody, request: Request) -> Response:
        """Write an answer, token by token."""
        return await answer(front, GenerateStream, body, request)

    @router.post(
        "/", **written(TGI_ERRORS, model=list[GenerateAnswer], content=EVENTS, description="The answer, in a list.")
    )
    async def compat_generate(body: CompatBody, request: Request) -> Response:
        """Write an answer, whole or token by token; the input comes in front of it unless return_full_text is false."""
        return await answer(front, Compat, body, request)

    @router.get("/info", responses={424: TGI_ERRORS[424]})
    async def info() -> Info:
        """The model and its limits."""
        served = front.served()
        limits = TGILimits.of(served.info, settings, served.adapters)
        return Info(
            model_id=served.model_id,
            model_sha=None,
            model_dtype=served.info.format,
            model_device_type=compute_type(front),
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
