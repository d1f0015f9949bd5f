"""/embeddings: OpenAI's, for clients that leave /v1 out, and llama.cpp's server's, told apart by the key."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Tag

from tightrope.server.dialects.llamacpp_vectors import EmbedContent, PlacedVectors, embed_content
from tightrope.server.dialects.openai.embeddings import EMBEDDING_ERRORS, EmbeddingsBody, embeddings
from tightrope.server.http.body import JsonRoute, by_key
from tightrope.server.http.error_docs import written
from tightrope.server.state import AppState
from tightrope.server.vectors.writing import EmbeddingList

SharedBody = Annotated[
    Annotated[EmbeddingsBody, Tag("<input>")] | Annotated[EmbedContent, Tag("<content>")], by_key("input", "content")
]


def shared_embeddings_router(front: AppState) -> APIRouter:
    """POST /embeddings."""
    router = APIRouter(route_class=JsonRoute, tags=["llama.cpp"])

    @router.post("/embeddings", **written(EMBEDDING_ERRORS, model=EmbeddingList | list[PlacedVectors]))
    async def either(body: SharedBody, request: Request) -> Response:
        """Vectors of texts."""
        if isinstance(body, EmbeddingsBody):
            return await embeddings(front, body, request)
        return await embed_content(front, body, request)

    return router
