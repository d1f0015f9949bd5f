"""The OpenAI API: models, chat completions, completions."""

from fastapi import APIRouter, Request, Response

from tightrope.backends.embedding.card import EmbedderCard
from tightrope.server.answering import answer
from tightrope.server.dialects.openai.answers import ChatAnswer, CompletionAnswer, ModelCard, ModelList, ModelStatus
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.dialects.openai.writing import Chat, Completions
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import only, written
from tightrope.server.models.model import Model
from tightrope.server.served import check_model
from tightrope.server.state import AppState

EVENTS = {
    "text/event-stream": {
        "example": 'data: {"id": "...", "choices": [...]}\n\ndata: [DONE]\n\n',
    }
}


def _status(model: Model) -> ModelStatus:
    if model.failure is not None:
        return ModelStatus(value="failed", failed=True, message=model.failure.message)
    is_coming = model.loading is not None and model.state != "loaded"
    return ModelStatus(value="loading" if is_coming else model.state)


def openai_router(front: AppState) -> APIRouter:
    """All routes, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    def card(model: Model, adapter: str | None = None) -> ModelCard:
        info = model.info
        return ModelCard(
            id=model.name if adapter is None else adapter,
            object="model",
            created=front.started,
            owned_by="tightrope",
            root=(model.name if info is None else info.model_id) if adapter is None else model.adapters[adapter],
            parent=None if adapter is None else model.name,
            max_model_len=None if info is None else info.max_model_len,
            status=_status(model),
        )

    def card_beside(embedder: EmbedderCard) -> ModelCard:
        return ModelCard(
            id=embedder.model_id,
            object="model",
            created=front.started,
            owned_by="tightrope",
            root=embedder.model_id,
            parent=None,
            max_model_len=embedder.max_tokens,
            status=ModelStatus(value="loaded"),
        )

    @router.get("/models", responses=only(401, 503))
    async def models() -> ModelList:
        """The models, each with its adapters behind it, and which of them are loaded; those that embed or rank last."""
        front.models.check_known()
        cards = [card(model, adapter) for model in front.models.all for adapter in (None, *model.adapters)]
        return ModelList(object="list", data=[*cards, *map(card_beside, front.embedder.cards)])

    @router.get("/models/{model:path}", responses=only(401, 404, 503, "default"))
    async def model(model: str) -> ModelCard:
        """One model; its name may contain slashes."""
        front.models.check_known()
        if (beside := front.embedder_of(model)) is not None:
            return card_beside(beside)
        found = front.models.find(model)
        return card(found, check_model(model, front.of(found).names(), is_openai=True))

    @router.post(
        "/chat/completions", **written(model=ChatAnswer, content=EVENTS, description="The answer, whole or as events.")
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await answer(front, Chat, body, request)

    @router.post(
        "/completions", **written(model=CompletionAnswer, content=EVENTS, description="The text, whole or as events.")
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        return await answer(front, Completions, body, request)

    return router
