"""Ollama's routes."""

import time
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tightrope import __version__
from tightrope.backends.embedding.card import EmbedderCard
from tightrope.engine.types import ModelInfo
from tightrope.server.answering import answer
from tightrope.server.dialects.ollama.bodies import (
    ModelDetails,
    OllamaAnswer,
    OllamaBody,
    OllamaChat,
    OllamaChatAnswer,
    OllamaError,
    OllamaGenerate,
    OllamaModel,
    OllamaModels,
    RunningModel,
    RunningModels,
    ShowBody,
    Shown,
)
from tightrope.server.dialects.ollama.keep_alive import FOR_EVER, expiry, keep_alive_s
from tightrope.server.dialects.ollama.writing import Chat, Generate, keep, now
from tightrope.server.http.body import AnyTypeRoute
from tightrope.server.http.error_docs import ERRORS, Documented, written
from tightrope.server.http.hangup import or_gone
from tightrope.server.replies.form import reply_form
from tightrope.server.replies.tools_in_words import takes_tools
from tightrope.server.served import check_model
from tightrope.server.state import AppState

LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}
ERROR_LINES: Documented = {status: row | {"model": OllamaError} for status, row in ERRORS.items() if status != 415}


def _only(*statuses: int | str) -> Documented:
    return {status: ERROR_LINES[status] for status in statuses}


def _details(info: ModelInfo | None) -> ModelDetails:
    """What is known of a model; None: it has not been loaded yet."""
    if info is None:
        return ModelDetails(format="", family="", families=[], quantization_level="")
    return ModelDetails(
        format=info.format,
        family=info.architecture,
        families=[info.architecture],
        quantization_level=info.format,
    )


def _details_beside(card: EmbedderCard) -> ModelDetails:
    """The same of one that embeds or ranks."""
    return ModelDetails(
        format=card.format, family=card.architecture, families=[card.architecture], quantization_level=card.format
    )


def _shown_beside(card: EmbedderCard, since: str) -> Shown:
    return Shown(
        template="",
        details=_details_beside(card),
        model_info={
            "general.architecture": card.architecture,
            f"{card.architecture}.context_length": card.max_tokens,
            f"{card.architecture}.embedding_length": card.dimensions,
        },
        capabilities=["embedding" if card.kind == "embedding" else "reranking"],
        modified_at=since,
    )


def _digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def _running(name: str, details: ModelDetails, expires_at: str, num_tokens: int) -> RunningModel:
    return RunningModel(
        name=name,
        model=name,
        size=0,
        digest=_digest(name),
        details=details,
        expires_at=expires_at,
        size_vram=0,
        context_length=num_tokens,
    )


async def _loaded(front: AppState, body: OllamaBody, request: Request, empty: dict[str, Any]) -> Response:
    """The answer to nothing: the model is loaded, or with a keep_alive of 0 unloaded where there are others."""
    reason = "load" if body.keep_alive is None or keep_alive_s(body.keep_alive) else "unload"
    if reason == "load" or front.models.is_alone:
        front = await front.at(request, body.model)
    else:
        front = front.of(await or_gone(request, front.models.unload(body.model)))
    name = check_model(body.model, front.names()) or front.model.name
    keep(front, body)
    made = {"model": name, "created_at": now(), **empty, "done": True, "done_reason": reason}
    media_type = "application/x-ndjson" if body.stream else "application/json"
    return Response(msgspec.json.encode(made) + b"\n", media_type=media_type)


def ollama_router(front: AppState) -> APIRouter:
    """/api/tags, /api/ps, /api/show, /api/version, /api/generate and /api/chat."""
    router = APIRouter(prefix="/api", route_class=AnyTypeRoute, tags=["Ollama"])
    since = datetime.fromtimestamp(front.started, UTC).isoformat().replace("+00:00", "Z")

    @router.get("/version")
    async def version() -> dict[str, str]:
        """This server's version."""
        return {"version": __version__}

    @router.get("/tags", responses=_only(401, 503))
    async def tags() -> OllamaModels:
        """The models, loaded or not, each with its adapters."""
        front.models.check_known()
        named = [(name, _details(model.info)) for model in front.models.all for name in (model.name, *model.adapters)]
        named += [(card.model_id, _details_beside(card)) for card in front.embedder.cards]
        return OllamaModels(
            models=[
                OllamaModel(name=name, model=name, modified_at=since, size=0, digest=_digest(name), details=details)
                for name, details in named
            ]
        )

    @router.get("/ps", responses=_only(401, 503))
    async def running() -> RunningModels:
        """The models that are loaded, and those that embed or rank beside them."""
        front.models.check_known()
        now_s = time.monotonic()
        found = [
            _running(
                model.name, _details(info), expiry(model, front.models.idle_s_of(model), now_s), info.max_model_len
            )
            for model in front.models.loaded
            if (info := model.info) is not None
        ]
        found += [
            _running(card.model_id, _details_beside(card), FOR_EVER, card.max_tokens) for card in front.embedder.cards
        ]
        return RunningModels(models=found)

    @router.post("/show", responses=_only(400, 401, 404, 413, 503, "default"))
    async def show(body: ShowBody) -> Shown:
        """A model, or an adapter of one: its template, its window, and what it can do.

        Of one that has never been loaded only its name is known, and it isn't loaded to tell more.
        """
        front.models.check_known()
        if (beside := front.embedder_of(body.model or body.name)) is not None:
            return _shown_beside(beside, since)
        chosen = front.of(front.models.find(body.model or body.name))
        check_model(body.model or body.name, chosen.names())
        if (info := chosen.model.info) is None:
            details = _details(None)
            return Shown(template="", details=details, model_info={}, capabilities=["completion"], modified_at=since)
        template = chosen.template_of(info)
        has_tools = takes_tools(template.source_for(has_tools=True))
        thinks = reply_form(template.source).has_thoughts
        return Shown(
            template=template.source,
            details=_details(info),
            model_info={
                "general.architecture": info.architecture,
                f"{info.architecture}.context_length": info.max_model_len,
            },
            capabilities=[
                name for name, has in (("completion", True), ("tools", has_tools), ("thinking", thinks)) if has
            ],
            modified_at=since,
        )

    @router.post("/generate", **written(ERROR_LINES, model=OllamaAnswer, content=LINES, description="The text."))
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Continue a prompt, or answer it by the chat template unless it is raw."""
        if not body.prompt:
            return await _loaded(front, body, request, Generate.wrap("", {}))
        return await answer(front, Generate, body, request)

    @router.post("/chat", **written(ERROR_LINES, model=OllamaChatAnswer, content=LINES, description="The answer."))
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Answer a chat; calls of tools come as objects."""
        if not body.messages:
            return await _loaded(front, body, request, Chat.wrap("", {}))
        return await answer(front, Chat, body, request)

    return router
