"""Reranking: /rerank speaks two dialects, told apart by the key that is present; /v1/rerank and /v2/rerank one."""

from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, Tag

from tightrope.server.dialects.openai.embeddings import EMBEDDING_ERRORS
from tightrope.server.dialects.tei import TEI_ERRORS, RerankTexts, TextScore, rerank_texts
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, FirstErrorOnly, JsonRoute, by_key
from tightrope.server.http.error_docs import written
from tightrope.server.http.long_lists import json_answer, json_list
from tightrope.server.state import AppState
from tightrope.server.vectors.asking import rank
from tightrope.server.vectors.writing import EmbeddingUsage


class DocumentText(Body):
    """A document that is an object."""

    text: str


class RerankDocuments(Body):
    """Jina's and Cohere's form, and llama.cpp's server's. A document that is too long is cut at its end, as they do."""

    query: str
    documents: Annotated[list[str | DocumentText], FirstErrorOnly()] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(None, ge=1, le=MAX_INT, description="So many of the best alone.")
    return_documents: bool = Field(False, description="Put each document beside its score.")
    raw_scores: bool = Field(False, description="Scores as the model has them, instead of from 0 to 1.")


RerankBody = Annotated[
    Annotated[RerankTexts, Tag("<texts>")] | Annotated[RerankDocuments, Tag("<documents>")],
    by_key("texts", "documents"),
]


class RankedDocument(BaseModel):
    index: int = Field(description="The document's place in the request.")
    relevance_score: float
    document: dict[str, str] = Field({}, description="Its text, if asked for; else absent.")


class Reranked(BaseModel):
    """The best first."""

    id: str
    object: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage


async def _documents(front: AppState, body: RerankDocuments, request: Request) -> Response:
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    card, ranked, num_tokens = await rank(front, request, body.query, texts, model=body.model, cut="end")
    results: list[dict[str, Any]] = []
    for one in ranked[: body.top_n]:
        shown = {"document": {"text": texts[one.index]}} if body.return_documents else {}
        results.append({"index": one.index, "relevance_score": one.logit if body.raw_scores else one.score, **shown})
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    named = {"id": f"rerank-{uuid4().hex}", "object": "list", "model": card.model_id}
    return json_answer({**named, "results": await json_list(results), "usage": usage})


def rerank_router(front: AppState) -> APIRouter:
    """POST /rerank, /v1/rerank, /v2/rerank, and llama.cpp's names of them."""
    router = APIRouter(route_class=JsonRoute, tags=["reranking"])
    reply = {"model": Reranked, "description": "The documents' places and scores, the best first."}

    @router.post("/rerank", **written({**EMBEDDING_ERRORS, **TEI_ERRORS}, model=list[TextScore] | Reranked))
    async def rerank(body: RerankBody, request: Request) -> Response:
        """Score texts against a query, in the form of Text Embeddings Inference, or documents, in that of Jina."""
        if isinstance(body, RerankTexts):
            return await rerank_texts(front, body, request)
        return await _documents(front, body, request)

    for path in ("/v1/rerank", "/v2/rerank", "/v1/reranking", "/reranking"):

        @router.post(path, **written(EMBEDDING_ERRORS, **reply))
        async def rerank_documents(body: RerankDocuments, request: Request) -> Response:
            """Score documents against a query."""
            return await _documents(front, body, request)

    return router
