"""llama.cpp's server's own form of embeddings."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, Field

from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import ERRORS, written
from tightrope.server.http.long_lists import json_answer, json_list
from tightrope.server.state import AppState
from tightrope.server.vectors.asking import Inputs, embed, texts_of
from tightrope.server.vectors.writing import slice_size

_NORMS = "Of which norm 1 is the length: 2 is Euclid's, 1 the sum; 0 scales to 16 bits, -1 leaves vectors as they are."
MAX_NORM = 64  # A higher one is the largest number alone.


class EmbedContent(Body):
    """POST /embedding."""

    content: Inputs = Field(
        validation_alias=AliasChoices("content", "input"), description="A text, its token ids, or a list of either."
    )
    model: str | None = None
    embd_normalize: int = Field(2, ge=-1, le=MAX_NORM, description=_NORMS)


class PlacedVectors(BaseModel):
    """embedding: a list with the text's one vector."""

    index: int
    embedding: list[list[float]]


async def embed_content(front: AppState, body: EmbedContent, request: Request) -> Response:
    """A list of PlacedVectors."""
    texts = texts_of(body.content, "content")
    _, vectors = await embed(front, request, texts, model=body.model, cut="no", norm=body.embd_normalize)

    def items() -> Iterator[dict[str, Any]]:
        for place in range(len(vectors.rows)):
            yield {"index": place, "embedding": [vectors.floats(place)]}

    return json_answer(await json_list(items(), slice_size(vectors)))


def llamacpp_vectors_router(front: AppState) -> APIRouter:
    """POST /embedding."""
    router = APIRouter(route_class=JsonRoute, tags=["llama.cpp"])
    errors = {**ERRORS, 501: ERRORS["default"] | {"description": "No such model is loaded beside the chat's."}}

    @router.post("/embedding", **written(errors, model=list[PlacedVectors], description="A vector for each text."))
    async def embedding(body: EmbedContent, request: Request) -> Response:
        """Vectors of texts."""
        return await embed_content(front, body, request)

    return router
