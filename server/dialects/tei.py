"""Text Embeddings Inference's routes: /embed, and its form of /rerank."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.backends.embedding.card import Cut
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, FirstErrorOnly, JsonRoute
from tightrope.server.http.error_docs import Documented, written
from tightrope.server.http.long_lists import json_answer, json_list
from tightrope.server.state import AppState
from tightrope.server.vectors.asking import AS_THEY_ARE, EUCLID, Inputs, embed, rank, texts_of
from tightrope.server.vectors.writing import number_lists

Direction = Literal["Left", "left", "Right", "right"]


class TEIError(BaseModel):
    """Every error of these routes."""

    error: str
    error_type: str = Field(description="Validation, Overloaded, Backend, Unhealthy, or a code of this server's.")


_DESCRIPTIONS: dict[int | str, str] = {
    400: "The body is no JSON.",
    401: "The key is missing or wrong.",
    413: "A text or the list is too long, or a value can't be honoured.",
    415: "The body is not declared as JSON.",
    422: "A field is missing or mistyped.",
    424: "The model failed.",
    429: "Too many requests wait; try again after Retry-After seconds.",
    501: "No such model is loaded beside the chat's.",
    503: "The model is loading, or is being loaded again.",
    "default": "Any other error.",
}
TEI_ERRORS: Documented = {status: {"model": TEIError, "description": text} for status, text in _DESCRIPTIONS.items()}


class _Truncated(Body):
    truncate: bool = Field(False, description="Cut texts that are too long, instead of refusing them.")
    truncation_direction: Direction = Field("Right", description="Where they are cut.")

    @property
    def cut(self) -> Cut:
        if not self.truncate:
            return "no"
        return "start" if self.truncation_direction.lower() == "left" else "end"


class EmbedBody(_Truncated):
    """POST /embed."""

    inputs: Inputs = Field(description="A text, its token ids, or a list of either.")
    normalize: bool = Field(True, description="Scale vectors to length 1.")
    prompt_name: str | None = Field(None, description="A prompt of the model's own, put in front of each text.")
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Cut vectors to so many numbers.")


class RerankTexts(_Truncated):
    """POST /rerank with texts."""

    query: str
    texts: Annotated[list[str], FirstErrorOnly()] = Field(min_length=1)
    raw_scores: bool = Field(False, description="Scores as the model has them, instead of from 0 to 1.")
    return_text: bool = Field(False, description="Put each text beside its score.")


class TextScore(BaseModel):
    index: int = Field(description="The text's place in the request.")
    text: str = Field("", description="Absent unless asked for.")
    score: float


async def rerank_texts(front: AppState, body: RerankTexts, request: Request) -> Response:
    """A list of TextScore, the best first."""
    _, ranked, _ = await rank(front, request, body.query, body.texts, model=None, cut=body.cut)
    scores: list[dict[str, Any]] = []
    for one in ranked:
        shown = {"text": body.texts[one.index]} if body.return_text else {}
        scores.append({"index": one.index, **shown, "score": one.logit if body.raw_scores else one.score})
    return json_answer(await json_list(scores))


def tei_router(front: AppState) -> APIRouter:
    """POST /embed."""
    router = APIRouter(route_class=JsonRoute, tags=["Text Embeddings Inference"])

    @router.post("/embed", **written(TEI_ERRORS, model=list[list[float]], description="A vector for each text."))
    async def tei_embed(body: EmbedBody, request: Request) -> Response:
        """Vectors of texts."""
        _, vectors = await embed(
            front,
            request,
            texts_of(body.inputs, "inputs"),
            model=None,
            cut=body.cut,
            dimensions=body.dimensions,
            norm=EUCLID if body.normalize else AS_THEY_ARE,
            prompt_name=body.prompt_name,
        )
        return json_answer(await number_lists(vectors))

    return router
