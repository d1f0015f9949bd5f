"""TabbyAPI's routes beside /v1/completions: the connection that gives SillyTavern everything.

Models are not loaded, unloaded or downloaded over HTTP; the admin key loads adapters, by the routes of
server/dialects/adapters.py.
"""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.types import Span, TextPrompt
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import CALL_ERRORS, STATUS_ERRORS
from tightrope.server.http.guards import has_key
from tightrope.server.http.token_ids import DecodeBody, Decoded, Encoded, encoded
from tightrope.server.state import AppState


class EncodeBody(Body):
    """POST /v1/token/encode. The counts of a prompt's pieces add up: a BOS is put in front only if asked for."""

    text: str
    add_bos_token: bool = False
    encode_special_tokens: bool = Field(True, description="Whether the text of special tokens becomes those tokens.")


class CardParameters(BaseModel):
    max_seq_len: int
    cache_size: int = Field(description="In tokens, over all sequences.")
    cache_mode: str
    max_batch_size: int


class TabbyCard(BaseModel):
    """The served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "tightrope"
    parameters: CardParameters


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


def tabby_router(front: AppState) -> APIRouter:
    """/v1/model, /v1/token, /v1/auth, /v1/lora and /v1/template."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["TabbyAPI"])

    def card() -> TabbyCard:
        served = front.served()
        info = served.info
        parameters = CardParameters(
            max_seq_len=info.max_model_len,
            cache_size=info.cache_tokens,
            cache_mode=info.cache_dtype,
            max_batch_size=info.max_num_seqs,
        )
        return TabbyCard(id=served.model_id, created=front.started, parameters=parameters)

    @router.get("/model/list", responses=STATUS_ERRORS)
    async def model_list() -> TabbyCards:
        """The models: the one that is served."""
        return TabbyCards(data=[card()])

    @router.get("/model", responses=STATUS_ERRORS)
    async def model() -> TabbyCard:
        """The served model."""
        return card()

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
    async def encode(body: EncodeBody) -> Response:
        """The token ids of a text."""
        span = Span(body.text, body.encode_special_tokens)
        return await encoded(await front.engine.tokenize(TextPrompt((span,), body.add_bos_token)))

    @router.post("/token/decode", responses=CALL_ERRORS)
    async def decode(body: DecodeBody) -> Decoded:
        """The text of token ids, special ones included."""
        return Decoded(text=await front.engine.detokenize(body.tokens))

    return router
