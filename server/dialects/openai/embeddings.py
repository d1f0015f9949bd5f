"""OpenAI's embeddings."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import ERRORS, written
from tightrope.server.state import AppState
from tightrope.server.vectors.asking import Inputs, embed, texts_of
from tightrope.server.vectors.writing import EmbeddingList, Encoding, openai_list

EMBEDDING_ERRORS = {**ERRORS, 501: ERRORS["default"] | {"description": "No such model is loaded beside the chat's."}}


class EmbeddingsBody(Body):
    """POST /v1/embeddings, with two fields of vLLM's and sentence-transformers'."""

    input: Inputs = Field(description="A text, its token ids, or a list of either.")
    model: str | None = None
    encoding_format: Encoding = "float"
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Cut vectors to so many numbers.")
    truncate_prompt_tokens: Literal[-1] | None = Field(None, description="-1 cuts texts that are too long.")
    prompt_name: str | None = Field(None, description="A prompt of the model's own, put in front of each text.")
    user: str | None = None

    without_effect = frozenset({"user"})


async def embeddings(front: AppState, body: EmbeddingsBody, request: Request) -> Response:
    """The answer."""
    card, vectors = await embed(
        front,
        request,
        texts_of(body.input, "input"),
        model=body.model,
        cut="no" if body.truncate_prompt_tokens is None else "end",
        dimensions=body.dimensions,
        prompt_name=body.prompt_name,
    )
    return await openai_list(card, vectors, body.encoding_format)


def embeddings_router(front: AppState) -> APIRouter:
    """POST /embeddings, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/embeddings", **written(EMBEDDING_ERRORS, model=EmbeddingList, description="A vector for each text."))
    async def openai_embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Vectors of texts, of length 1."""
        return await embeddings(front, body, request)

    return router
