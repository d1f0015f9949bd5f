"""Loading and unloading LoRA adapters while the server runs, by vLLM's routes; AdminGuard stands before them."""

import logging

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from tightrope.backends.settings import check_adapter_name
from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import ERRORS, Documented
from tightrope.server.http.errors import SwitchedOff
from tightrope.server.served import means_the_model
from tightrope.server.state import AppState

log = logging.getLogger("tightrope.server")

REPLIES: Documented = {
    200: {"description": "It is done.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **{status: ERRORS[status] for status in (400, 401, 404, 413, 415, 503, "default")},
    403: {**ERRORS["default"], "description": "The server was started without an admin key or a folder of adapters."},
}


class LoadBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(description="What requests will call it.")
    lora_path: str = Field(min_length=1, description="Where it lies, from the folder of adapters on or absolute.")
    model: str | None = Field(None, description="Beside which of several models; else the one used last.")
    load_inplace: bool = Field(False, description="Whether a loaded adapter of that name gives way to it.")


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def adapter_router(front: AppState) -> APIRouter:
    """Both routes, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["adapters"], default_response_class=Response)

    @router.post("/load_lora_adapter", responses=REPLIES)
    async def load(body: LoadBody, request: Request) -> Response:
        """Load an adapter; when this is answered, requests may name it."""
        if front.settings.engine.model.adapter_folder is None:
            raise SwitchedOff("no adapter can be loaded while this server runs: --lora-folder DIR allows those in DIR")
        chosen = await front.at(request, body.model)
        _check_name(body.lora_name, chosen)
        await chosen.engine.load_adapter(body.lora_name, body.lora_path, in_place=body.load_inplace)
        log.info("adapter loaded: name=%s path=%s", body.lora_name, chosen.engine.adapters.get(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter", responses=REPLIES)
    async def unload(body: UnloadBody, request: Request) -> Response:
        """Unload an adapter: answers under way finish with it, and then its memory is free."""
        chosen = await front.at(request, None if front.models.is_alone else body.lora_name)
        await chosen.engine.unload_adapter(body.lora_name)
        log.info("adapter unloaded: name=%s", body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _check_name(name: str, front: AppState) -> None:
    try:
        check_adapter_name(name)
    except ValueError as error:
        raise InvalidRequest(f"lora_name: {error}", "lora_name") from None
    owner = next((model for model in front.models.all if name in (model.name, *model.adapters)), front.model)
    if owner is not front.model:
        raise InvalidRequest(f"lora_name: {name!r} is the name of another model or adapter", "lora_name")
    if means_the_model(name, front.served().model_id):
        raise InvalidRequest(f"lora_name: {name!r} means the model itself", "lora_name")
