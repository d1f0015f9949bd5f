"""What KoboldCpp's own page asks for beside texts: stopping an answer, how far it is, and what the server is at."""

import time

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.body import AnyTypeRoute, JsonRequest
from tightrope.server.http.error_docs import CALL_ERRORS, STATUS_ERRORS
from tightrope.server.state import AppState

MOST_TOKENS = 512  # The page offers answers of so many.

GENKEY_BODY = {  # It may be left out, and the media type with it.
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": {"properties": {"genkey": {"type": "string"}}, "type": "object"}}},
    }
}


class Stopped(BaseModel):
    """success: whether anything was written."""

    success: bool


class Written(BaseModel):
    text: str


class Results(BaseModel):
    """Empty where nothing is written."""

    results: list[Written]


class MaxLength(BaseModel):
    value: int


class Perf(BaseModel):
    """queue: answers that wait. idle: 1 where none is written. uptime: in seconds."""

    queue: int
    idle: int = Field(ge=0, le=1)
    uptime: int


async def _genkey(request: Request) -> str:
    """The body's genkey; the empty text without one. Raises InvalidRequest."""
    headers = request.headers
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    data = (await JsonRequest.read(request, takes_any_type=True)).data if has_body else None
    genkey = data.get("genkey") or "" if isinstance(data, dict) else ""
    if not isinstance(genkey, str):
        raise InvalidRequest("genkey must be a string", "genkey")
    return genkey


def koboldcpp_page_router(front: AppState) -> APIRouter:
    """/api/extra/abort, generate/check, perf, preloadstory, and /api/v1/config/max_length."""
    router = APIRouter(prefix="/api", route_class=AnyTypeRoute, tags=["KoboldCpp"])

    @router.post("/extra/abort", responses=CALL_ERRORS, openapi_extra=GENKEY_BODY)
    async def abort(request: Request) -> Stopped:
        """Stop the generations under the body's `genkey`, or those without one. Closing a connection does the same."""
        return Stopped(success=front.aborts.abort(await _genkey(request)))

    def so_far(genkey: str, request: Request) -> Results:
        return Results(results=[Written(text=front.aborts.written(genkey, front.owner(request)))])

    @router.post("/extra/generate/check", responses=CALL_ERRORS, openapi_extra=GENKEY_BODY)
    async def check(request: Request) -> Results:
        """What has been written so far under the body's `genkey`, for the key that has asked for it."""
        return so_far(await _genkey(request), request)

    @router.get("/extra/generate/check", responses=STATUS_ERRORS)
    async def check_without_genkey(request: Request) -> Results:
        """The same of a generation without one."""
        return so_far("", request)

    @router.get("/extra/perf", responses=STATUS_ERRORS)
    async def perf() -> Perf:
        """What the server is at."""
        engines = [model.engine for model in front.models.loaded]
        waiting, is_idle = sum(engine.num_waiting for engine in engines), not front.models.is_writing
        return Perf(queue=waiting, idle=int(is_idle), uptime=int(time.time()) - front.started)

    @router.get("/v1/config/max_length", responses=STATUS_ERRORS)
    async def max_length() -> MaxLength:
        """The longest answer that the page offers, in tokens; a request may ask for more."""
        return MaxLength(value=min(MOST_TOKENS, front.info().max_model_len // 2))

    @router.get("/v1/config/soft_prompts_list", responses=STATUS_ERRORS)
    async def soft_prompts() -> dict[str, list[str]]:
        """KoboldAI's soft prompts: none."""
        return {"values": []}

    @router.get("/extra/preloadstory", responses=STATUS_ERRORS)
    async def preloadstory() -> dict[str, str]:
        """The story that the server was started with: none."""
        return {}

    return router
