"""text-generation-webui's routes beside /v1/completions, all under /v1/internal."""

from fastapi import APIRouter, Response
from pydantic import BaseModel

from tightrope.engine.types import Span, TextPrompt, TokenRun
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import CALL_ERRORS, STATUS_ERRORS
from tightrope.server.http.token_ids import DecodeBody, Decoded, Encoded, encoded
from tightrope.server.state import AppState


class TextOnly(Body):
    """POST /v1/internal/encode and token-count."""

    text: str


class Length(BaseModel):
    length: int


class InternalInfo(BaseModel):
    model_name: str
    lora_names: list[str] = []


def ooba_router(front: AppState) -> APIRouter:
    """/v1/internal: the model's name, token ids of text and back."""
    router = APIRouter(prefix="/v1/internal", route_class=JsonRoute, tags=["text-generation-webui"])

    async def tokens_of(text: str) -> TokenRun:
        return await front.engine.tokenize(TextPrompt((Span(text),), add_bos=False))

    @router.get("/model/info", responses=STATUS_ERRORS)
    async def model_info() -> InternalInfo:
        """The served model and its adapters."""
        served = front.served()
        return InternalInfo(model_name=served.model_id, lora_names=list(served.adapters))

    @router.post("/encode", responses=CALL_ERRORS, response_model=Encoded)
    async def encode(body: TextOnly) -> Response:
        """The token ids of a text, without a BOS in front: the counts of a prompt's pieces add up."""
        return await encoded(await tokens_of(body.text))

    @router.post("/token-count", responses=CALL_ERRORS)
    async def token_count(body: TextOnly) -> Length:
        """How many tokens a text has."""
        return Length(length=len(await tokens_of(body.text)))

    @router.post("/decode", responses=CALL_ERRORS)
    async def decode(body: DecodeBody) -> Decoded:
        """The text of token ids, special ones included."""
        return Decoded(text=await front.engine.detokenize(body.tokens))

    return router
