"""The application: all routes, and what stands before them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Query, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from tightrope import __version__
from tightrope.server.dialects.adapters import adapter_router
from tightrope.server.dialects.anthropic.routes import anthropic_router
from tightrope.server.dialects.koboldcpp import koboldcpp_router
from tightrope.server.dialects.koboldcpp_page import koboldcpp_page_router
from tightrope.server.dialects.llamacpp import llamacpp_router
from tightrope.server.dialects.llamacpp_vectors import llamacpp_vectors_router
from tightrope.server.dialects.ollama.routes import ollama_router
from tightrope.server.dialects.ollama.vectors import ollama_vectors_router
from tightrope.server.dialects.ooba import ooba_router
from tightrope.server.dialects.openai.embeddings import embeddings_router
from tightrope.server.dialects.openai.routes import openai_router
from tightrope.server.dialects.responses.routes import responses_router
from tightrope.server.dialects.tabby import tabby_router
from tightrope.server.dialects.tei import tei_router
from tightrope.server.dialects.tgi.routes import tgi_router
from tightrope.server.http.api_page import add_api_page
from tightrope.server.http.draining import Drain, DrainGuard
from tightrope.server.http.error_docs import ErrorText
from tightrope.server.http.errors import install_handlers
from tightrope.server.http.guards import AdminGuard, BodyLimit, KeyGuard
from tightrope.server.http.head_requests import HeadAsGet
from tightrope.server.http.holds import HoldGuard
from tightrope.server.http.paths import PlainPaths
from tightrope.server.http.queue_guard import QueueGuard
from tightrope.server.http.resuming import STREAM_ID
from tightrope.server.http.sites import HostGuard, OriginGuard
from tightrope.server.page.files import PAGE, PREFIX, page_files, wants_page
from tightrope.server.page.routes import add_page_files, plan_router
from tightrope.server.shared_paths.embeddings import shared_embeddings_router
from tightrope.server.shared_paths.invocations import invocations_router
from tightrope.server.shared_paths.rerank import rerank_router
from tightrope.server.shared_paths.streams import streams_router
from tightrope.server.shared_paths.tokenize import tokenize_router
from tightrope.server.state import AppState

MODEL = Query(None, description="Which of several models; all of them without it.")
UNHEALTHY = {"error": "unhealthy", "error_type": "healthcheck"}


def create_app(front: AppState, drain: Drain | None = None) -> FastAPI:
    """The server's whole HTTP face. Its lifespan starts the models, and closes them and the renderer.

    drain: counts the requests under way, and refuses new ones once it has begun.
    """
    models, settings = front.models, front.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        starting = asyncio.create_task(front.start_engines(), name="start of the engines")
        if not front.embedder.is_there:
            await starting  # It takes a moment, and embedding models some seconds.
        try:
            yield
        finally:
            starting.cancel()
            await front.embedder.close()
            await front.streams.close()
            await front.renderer.close()
            await models.close()

    app = FastAPI(title="tightrope", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    install_handlers(app, front.metrics.refused)
    # Only documents that a key is asked for; KeyGuard asks, before a byte of the body is read.
    keyed = [Security(HTTPBearer(auto_error=False))] if settings.api_key is not None else []
    for router in (openai_router(front), responses_router(front), anthropic_router(front)):
        app.include_router(router, prefix="/v1", dependencies=keyed)
        app.include_router(router, dependencies=keyed, include_in_schema=False)  # Some clients leave /v1 out.
    app.include_router(adapter_router(front), prefix="/v1", dependencies=[Security(HTTPBearer(auto_error=False))])
    app.include_router(tgi_router(front), dependencies=keyed)
    app.include_router(tokenize_router(front), dependencies=keyed)
    app.include_router(invocations_router(front), dependencies=keyed)
    app.include_router(streams_router(front), prefix="/v1", dependencies=keyed)
    for family in (tabby_router, ooba_router, llamacpp_router, koboldcpp_router, ollama_router):
        app.include_router(family(front), dependencies=keyed)
    app.include_router(koboldcpp_page_router(front), dependencies=keyed)
    app.include_router(embeddings_router(front), prefix="/v1", dependencies=keyed)
    for vectors in (
        shared_embeddings_router,
        rerank_router,
        tei_router,
        llamacpp_vectors_router,
        ollama_vectors_router,
    ):
        app.include_router(vectors(front), dependencies=keyed)
    app.include_router(plan_router(front), dependencies=keyed)
    _add_probes(app, front)
    add_api_page(app)
    add_page_files(app)
    # The last one added stands first.
    app.add_middleware(HeadAsGet)
    app.add_middleware(HoldGuard)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_held_bytes=settings.max_held_bytes,
        retry_after_s=lambda: models.retry_after_s,
        refused=front.metrics.refused,
    )
    app.add_middleware(QueueGuard, check_room=models.check_room, refused=front.metrics.refused)
    app.add_middleware(AdminGuard, admin_key=settings.admin_key)
    if settings.api_key is not None:
        page = [PREFIX + name for name in page_files()]  # A visitor has to see where to type the key.
        app.add_middleware(KeyGuard, api_key=settings.api_key, admin_key=settings.admin_key, also_open=page)
    if drain is not None:
        app.add_middleware(DrainGuard, drain=drain)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        expose_headers=[STREAM_ID],
        allow_headers=["*"],  # SDKs ask to send many headers of their own, and the answer names what is asked for.
        allow_credentials=False,
        allow_private_network=True,  # An origin that is let in may be a public site.
    )
    app.add_middleware(OriginGuard, origins=settings.cors_origins)
    app.add_middleware(HostGuard, names=settings.host_names)
    app.add_middleware(PlainPaths)
    return app


def _add_probes(app: FastAPI, front: AppState) -> None:
    unhealthy: dict[int | str, dict[str, Any]] = {
        200: {"description": "Ready; the body is empty.", "content": {}},
        503: {"model": ErrorText, "description": "The model is loading, or the engine is restarting or stuck."},
        "default": {"model": ErrorText, "description": "Any other error."},
    }

    @app.get("/health", response_class=Response, responses=unhealthy, tags=["probes"])
    @app.get("/v1/health", response_class=Response, include_in_schema=False)
    @app.get("/ping", response_class=Response, responses=unhealthy, tags=["probes"])
    async def health(model: str | None = MODEL) -> Response:
        """Whether requests can be served now; of a model, whether it is loaded and answers."""
        if front.models.is_healthy if model is None else front.models.answers(model):
            return Response()
        headers = {"retry-after": str(front.models.retry_after_s)}
        return Response(msgspec.json.encode(UNHEALTHY), 503, headers, "application/json")

    @app.get("/", response_class=Response, responses=unhealthy, tags=["probes"])
    async def root(request: Request) -> Response:
        """The page, for browsers, which ask for HTML by name; for all others the same as /health."""
        told = {"vary": "accept"}
        if wants_page(request):
            return page_files()[PAGE].reply(request, told)
        reply = await health(None)
        reply.headers.update(told)
        return reply

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["probes"],
    )
    async def metrics() -> Response:
        """Counters and gauges in Prometheus' text format."""
        return Response(front.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", tags=["probes"])
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @app.get("/api-doc/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        return JSONResponse(app.openapi())
