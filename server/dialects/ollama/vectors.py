"""Ollama's two routes for vectors."""

import time
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.server.dialects.ollama.bodies import OllamaError
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import AnyTypeRoute, Body, FirstErrorOnly
from tightrope.server.http.error_docs import ERRORS, Documented, written
from tightrope.server.http.long_lists import json_answer
from tightrope.server.state import AppState
from tightrope.server.vectors.asking import AS_THEY_ARE, CUT, embed, model_of
from tightrope.server.vectors.writing import number_lists

_ERRORS: Documented = {status: row | {"model": OllamaError} for status, row in ERRORS.items() if status != 415}
_ERRORS |= {501: _ERRORS["default"] | {"description": "No such model is loaded beside the chat's."}}


class _Keeping(Body):
    model: str | None = None
    keep_alive: int | float | str | None = Field(None, description="The model stays loaded: changes nothing.")
    options: dict[str, object] | None = Field(None, description="Of the model's run; nothing in it changes a vector.")

    without_effect = frozenset({"keep_alive", "options"})


class OllamaEmbed(_Keeping):
    """POST /api/embed."""

    input: str | Annotated[list[str], FirstErrorOnly()] = Field("", description="Without one the model is named.")
    truncate: bool = Field(True, description="Cut texts that are too long; false refuses them.")
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Cut vectors to so many numbers.")


class OllamaEmbeddings(_Keeping):
    """POST /api/embeddings, the older form; a text that is too long is cut."""

    prompt: str = ""


class OllamaVectors(BaseModel):
    """Durations in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class OllamaVector(BaseModel):
    embedding: list[float]


def ollama_vectors_router(front: AppState) -> APIRouter:
    """/api/embed and /api/embeddings."""
    router = APIRouter(prefix="/api", route_class=AnyTypeRoute, tags=["Ollama"])

    @router.post("/embed", **written(_ERRORS, model=OllamaVectors, description="A vector for each text."))
    async def ollama_embed(body: OllamaEmbed, request: Request) -> Response:
        """Vectors of texts, of length 1."""
        began_s = time.monotonic()
        if not body.input:
            _, card = model_of(front, "embedding", body.model)
            return json_answer({"model": body.model or card.model_id, "embeddings": []})
        texts = [body.input] if isinstance(body.input, str) else body.input
        cut = CUT[body.truncate]
        card, vectors = await embed(front, request, texts, model=body.model, cut=cut, dimensions=body.dimensions)
        return json_answer(
            {
                "model": body.model or card.model_id,
                "embeddings": await number_lists(vectors),
                "total_duration": round(1e9 * (time.monotonic() - began_s)),
                "load_duration": 0,
                "prompt_eval_count": sum(vectors.num_tokens),
            }
        )

    @router.post("/embeddings", **written(_ERRORS, model=OllamaVector, description="The vector."))
    async def ollama_embeddings(body: OllamaEmbeddings, request: Request) -> Response:
        """The vector of one text, as the model has it, of any length."""
        if not body.prompt:
            model_of(front, "embedding", body.model)
            return json_answer({"embedding": []})
        _, vectors = await embed(front, request, [body.prompt], model=body.model, cut="end", norm=AS_THEY_ARE)
        return json_answer({"embedding": vectors.floats(0)})

    return router
