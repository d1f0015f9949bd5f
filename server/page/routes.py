"""The routes of the page's files, and of what it shows of the memory."""

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, Field

from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import MODEL_ERRORS
from tightrope.server.page.files import PREFIX, page_files
from tightrope.server.state import AppState


class MemoryPlan(BaseModel):
    """Where the memory goes, in bytes, and the cache, in tokens; the names are those of `tightrope plan --json`."""

    model: str
    architecture: str
    format: str
    device: str = Field(description='Whose memory it is: "cpu", "cuda", or another library\'s of llama.cpp.')
    memory_bytes: int = Field(description="For weights, cache and workspace together; 0 where nobody knows.")
    weight_bytes: int
    host_bytes: int = Field(description="Of weights in the machine's own memory beside a card.")
    workspace_bytes: int
    cache_bytes: int
    run_bytes: int = Field(description="Of the machine's memory, for chats that have left the cache.")
    devices: list[str] = Field(description="Names, where several hold the model; the lists below follow their order.")
    device_memory_bytes: list[int]
    device_weight_bytes: list[int]
    device_cache_bytes: list[int]
    device_workspace_bytes: list[int]
    device_layers: list[int | None] = Field(description="How many of the layers; null where each has a part of all.")
    cache: str = Field(description="How keys and values are stored.")
    cache_tokens: int
    used_tokens: int = Field(description="Of the cache, by answers that are being written.")
    reusable_tokens: int = Field(description="Of the cache, kept of finished chats.")
    window: int
    trained_len: int


def add_page_files(app: FastAPI) -> None:
    """Serve what the page is made of; the page itself is at `/`."""

    async def file(request: Request) -> Response:
        return page_files()[request.url.path.removeprefix(PREFIX)].reply(request)

    for name in page_files():
        app.add_route(PREFIX + name, file, include_in_schema=False)


def plan_router(front: AppState) -> APIRouter:
    """GET /plan."""
    router = APIRouter(route_class=JsonRoute, tags=["page"])

    @router.get("/plan", responses=MODEL_ERRORS)
    async def plan(model: str | None = None) -> MemoryPlan:
        """Where the memory goes of the model of this name: weights, cache, workspace, and what is free of it."""
        chosen = front if model is None else front.of(front.models.find(model))
        served, stats = chosen.served(), chosen.engine.stats
        info, memory = served.info, served.info.memory
        return MemoryPlan(
            model=served.model_id,
            architecture=info.architecture,
            format=info.format,
            device=memory.device,
            memory_bytes=memory.memory_bytes,
            weight_bytes=memory.weight_bytes,
            host_bytes=memory.host_bytes,
            workspace_bytes=memory.workspace_bytes,
            cache_bytes=memory.cache_bytes,
            run_bytes=memory.run_bytes,
            devices=[share.device for share in memory.shares],
            device_memory_bytes=[share.memory_bytes for share in memory.shares],
            device_weight_bytes=[share.weight_bytes for share in memory.shares],
            device_cache_bytes=[share.cache_bytes for share in memory.shares],
            device_workspace_bytes=[share.workspace_bytes for share in memory.shares],
            device_layers=[share.layers for share in memory.shares],
            cache=info.cache_dtype,
            cache_tokens=info.cache_tokens,
            used_tokens=stats.cache_used,
            reusable_tokens=stats.cache_reusable,
            window=info.max_model_len,
            trained_len=info.trained_len,
        )

    return router
