"""Ollama's routes."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tightrope import __version__
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
from tightrope.server.dialects.ollama.writing import Chat, Generate, now
from tightrope.server.http.body import AnyTypeRoute
from tightrope.server.http.error_docs import ERRORS, Documented, written
from tightrope.server.replies.form import reply_form
from tightrope.server.replies.tools_in_words import takes_tools
from tightrope.server.served import Served, check_model
from tightrope.server.state import AppState

LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}
FOR_EVER = "2318-12-31T00:00:00Z"  # The model is not unloaded.
ERROR_LINES: Documented = {status: row | {"model": OllamaError} for status, row in ERRORS.items() if status != 415}


def _only(*statuses: int | str) -> Documented:
    return {status: ERROR_LINES[status] for status in statuses}


def _details(info: ModelInfo) -> ModelDetails:
    return ModelDetails(
        format=info.format,
        family=info.architecture,
        families=[info.architecture],
        quantization_level=info.format,
    )


def _digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def _loaded(body: OllamaBody, served: Served, empty: dict[str, Any]) -> Response:
    name = check_model(body.model, served) or served.model_id
    reason = "unload" if body.keep_alive in (0, "0") else "load"
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
        """The models: the one that is served, and its adapters."""
        served = front.served()
        details = _details(served.info)
        return OllamaModels(
            models=[
                OllamaModel(name=name, model=name, modified_at=since, size=0, digest=_digest(name), details=details)
                for name in (served.model_id, *served.adapters)
            ]
        )

    @router.get("/ps", responses=_only(401, 503))
    async def running() -> RunningModels:
        """The loaded model."""
        served = front.served()
        name, info = served.model_id, served.info
        model = RunningModel(
            name=name,
            model=name,
            size=0,
            digest=_digest(name),
            details=_details(info),
            expires_at=FOR_EVER,
            size_vram=0,
            context_length=info.max_model_len,
        )
        return RunningModels(models=[model])

    @router.post("/show", responses=_only(400, 401, 404, 413, 503, "default"))
    async def show(body: ShowBody) -> Shown:
        """The served model, or one of its adapters: its template, its window, and what it can do."""
        served = front.served()
        check_model(body.model or body.name, served)
        info, template = served.info, front.template()
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
            return _loaded(body, front.served(), Generate.wrap("", {}))
        return await answer(front, Generate, body, request)

    @router.post("/chat", **written(ERROR_LINES, model=OllamaChatAnswer, content=LINES, description="The answer."))
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Answer a chat; calls of tools come as objects."""
        if not body.messages:
            return _loaded(body, front.served(), Chat.wrap("", {}))
        return await answer(front, Chat, body, request)

    return router
