"""TabbyAPI's routes beside /v1/completions: the connection that gives SillyTavern everything.

Models of the list are loaded and unloaded; none is downloaded. The admin key loads adapters, by the routes of
server/dialects/adapters.py.
"""

import asyncio
from collections.abc import AsyncGenerator

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.types import ModelInfo, Span, TextPrompt
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import CALL_ERRORS, STATUS_ERRORS, only, written
from tightrope.server.http.guards import has_key
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.sse import event_stream
from tightrope.server.http.token_ids import DecodeBody, Decoded, Encoded, encoded
from tightrope.server.models.model import Model
from tightrope.server.models.models import Models
from tightrope.server.state import AppState

LOOK_S = 0.5  # An event tells so often how far a load is.


class EncodeBody(Body):
    """POST /v1/token/encode. The counts of a prompt's pieces add up: a BOS is put in front only if asked for."""

    text: str
    add_bos_token: bool = False
    encode_special_tokens: bool = Field(True, description="Whether the text of special tokens becomes those tokens.")


class LoadBody(Body):
    """POST /v1/model/load. The model is loaded with the settings that the server's list has for it."""

    model_name: str = Field("", description="One of /v1/model/list.")
    name: str = Field("", description="The older name of model_name.")


class CardParameters(BaseModel):
    max_seq_len: int
    cache_size: int = Field(description="In tokens, over all sequences.")
    cache_mode: str
    max_batch_size: int


class TabbyCard(BaseModel):
    """A model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "tightrope"
    parameters: CardParameters | None = Field(description="Null where it has not been loaded yet.")


class TabbyCards(BaseModel):
    object: str = "list"
    data: list[TabbyCard]


class Permission(BaseModel):
    permission: str


class LoraCard(BaseModel):
    """A loaded adapter, which a request names as its model."""

    id: str
    object: str = "lora"
    created: int
    owned_by: str = "tightrope"


class Loras(BaseModel):
    object: str = "list"
    data: list[LoraCard]


class Templates(BaseModel):
    object: str = "list"
    data: list[str] = []


LOAD_EVENTS = {"text/event-stream": {"example": 'data: {"model_type": "model", "module": 1, "modules": 1, ...}\n\n'}}
LOAD_ERRORS = only(400, 401, 404, 413, 415, "default")


async def _loading(models: Models, model: Model) -> AsyncGenerator[bytes, None]:
    """TabbyAPI's events of a load, of which a module is a hundredth here. Raises what Models.load raises."""
    loading = asyncio.ensure_future(models.load(model.name))
    try:
        while not loading.done():
            yield _loaded(min(99, int(100 * model.engine.load_share)), "processing")
            await asyncio.wait((loading,), timeout=LOOK_S)
        await loading
        yield _loaded(100, "finished")
    finally:
        loading.cancel()


def _loaded(percent: int, status: str) -> bytes:
    event = {"model_type": "model", "module": percent, "modules": 100, "status": status}
    return b"data: %b\n\n" % msgspec.json.encode(event)


def tabby_router(front: AppState) -> APIRouter:
    """/v1/model, /v1/token, /v1/auth, /v1/lora and /v1/template."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["TabbyAPI"])

    def card(name: str, info: ModelInfo | None) -> TabbyCard:
        parameters = (
            None
            if info is None
            else CardParameters(
                max_seq_len=info.max_model_len,
                cache_size=info.cache_tokens,
                cache_mode=info.cache_dtype,
                max_batch_size=info.max_num_seqs,
            )
        )
        return TabbyCard(id=name, created=front.started, parameters=parameters)

    @router.get("/model/list", responses=STATUS_ERRORS)
    async def model_list() -> TabbyCards:
        """The models, loaded or not."""
        front.models.check_known()
        return TabbyCards(data=[card(model.name, model.info) for model in front.models.all])

    @router.get("/model", responses=STATUS_ERRORS)
    async def model() -> TabbyCard:
        """The loaded model, or of several the one that was used last."""
        served = front.served()
        return card(served.model_id, served.info)

    @router.post("/model/load", **written(LOAD_ERRORS, content=LOAD_EVENTS, description="How far it is."))
    async def load(body: LoadBody) -> Response:
        """Load a model of the list; events tell how far it is, and what keeps it from being loaded."""
        found = front.models.find(body.model_name or body.name)
        return event_stream(_loading(front.models, found), "openai", {})

    @router.post("/model/unload", response_class=Response, responses=only(401, 503))
    async def unload(request: Request) -> None:
        """Unload the model that was used last, once the answers under way have finished."""
        await or_gone(request, front.models.unload(front.model.name))

    @router.get("/auth/permission", responses=STATUS_ERRORS)
    async def permission(request: Request) -> Permission:
        """What the key allows."""
        is_admin = has_key(request.scope, front.settings.admin_key)
        return Permission(permission="admin" if is_admin else "api")

    @router.get("/lora/list", responses=STATUS_ERRORS)
    @router.get("/loras", responses=STATUS_ERRORS)
    @router.get("/lora", responses=STATUS_ERRORS)
    async def loras() -> Loras:
        """The loaded adapters."""
        return Loras(data=[LoraCard(id=name, created=front.started) for name in front.served().adapters])

    @router.get("/template/list", responses=STATUS_ERRORS)
    @router.get("/templates", responses=STATUS_ERRORS)
    async def templates() -> Templates:
        """The template is chosen at the start, so there is none to choose from."""
        return Templates()

    @router.post("/token/encode", responses=CALL_ERRORS, response_model=Encoded)
    async def encode(body: EncodeBody, request: Request) -> Response:
        """The token ids of a text."""
        span = Span(body.text, body.encode_special_tokens)
        chosen = await front.at(request, body.named_model)
        return await encoded(await chosen.engine.tokenize(TextPrompt((span,), body.add_bos_token)))

    @router.post("/token/decode", responses=CALL_ERRORS)
    async def decode(body: DecodeBody, request: Request) -> Decoded:
        """The text of token ids, special ones included."""
        chosen = await front.at(request, body.named_model)
        return Decoded(text=await chosen.engine.detokenize(body.tokens))

    return router
