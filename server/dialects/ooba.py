"""text-generation-webui's routes beside /v1/completions, all under /v1/internal."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from tightrope.engine.types import Span, TextPrompt, TokenRun
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import CALL_ERRORS, STATUS_ERRORS, only
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.token_ids import DecodeBody, Decoded, Encoded, encoded
from tightrope.server.state import AppState


class TextOnly(Body):
    """POST /v1/internal/encode and token-count."""

    text: str


class LoadBody(Body):
    """POST /v1/internal/model/load. The model is loaded with the settings that the server's list has for it."""

    model_name: str


class ModelNames(BaseModel):
    model_names: list[str]


class Length(BaseModel):
    length: int


class InternalInfo(BaseModel):
    model_name: str
    lora_names: list[str] = []


LOAD_ERRORS = only(400, 401, 404, 413, 415, 429, 500, 503, "default")


def ooba_router(front: AppState) -> APIRouter:
    """/v1/internal: the model's name, token ids of text and back."""
    router = APIRouter(prefix="/v1/internal", route_class=JsonRoute, tags=["text-generation-webui"])

    async def tokens_of(body: TextOnly, request: Request) -> TokenRun:
        chosen = await front.at(request, body.named_model)
        return await chosen.engine.tokenize(TextPrompt((Span(body.text),), add_bos=False))

    @router.get("/model/info", responses=STATUS_ERRORS)
    async def model_info() -> InternalInfo:
        """The loaded model, or of several the one that was used last, and its adapters."""
        served = front.served()
        return InternalInfo(model_name=served.model_id, lora_names=list(served.adapters))

    @router.get("/model/list", responses=STATUS_ERRORS)
    async def model_list() -> ModelNames:
        """The models, loaded or not."""
        front.models.check_known()
        return ModelNames(model_names=[model.name for model in front.models.all])

    @router.post("/model/load", responses=LOAD_ERRORS)
    async def load(body: LoadBody, request: Request) -> str:
        """Load a model of the list; answered when it is loaded."""
        await or_gone(request, front.models.load(body.model_name))
        return "OK"

    @router.post("/model/unload", responses=only(401, 503))
    async def unload(request: Request) -> str:
        """Unload the model that was used last, once the answers under way have finished."""
        await or_gone(request, front.models.unload(front.model.name))
        return "OK"

    @router.post("/encode", responses=CALL_ERRORS, response_model=Encoded)
    async def encode(body: TextOnly, request: Request) -> Response:
        """The token ids of a text, without a BOS in front: the counts of a prompt's pieces add up."""
        return await encoded(await tokens_of(body, request))

    @router.post("/token-count", responses=CALL_ERRORS)
    async def token_count(body: TextOnly, request: Request) -> Length:
        """How many tokens a text has."""
        return Length(length=len(await tokens_of(body, request)))

    @router.post("/decode", responses=CALL_ERRORS)
    async def decode(body: DecodeBody, request: Request) -> Decoded:
        """The text of token ids, special ones included."""
        chosen = await front.at(request, body.named_model)
        return Decoded(text=await chosen.engine.detokenize(body.tokens))

    return router
