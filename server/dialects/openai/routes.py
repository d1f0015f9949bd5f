"""The OpenAI API: models, chat completions, completions."""

from fastapi import APIRouter, Request, Response

from tightrope.server.answering import answer
from tightrope.server.dialects.openai.answers import ChatAnswer, CompletionAnswer, ModelCard, ModelList
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.dialects.openai.writing import Chat, Completions
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import only, written
from tightrope.server.served import check_model
from tightrope.server.state import AppState

EVENTS = {
    "text/event-stream": {
        "example": 'data: {"id": "...", "choices": [...]}\n\ndata: [DONE]\n\n',
    }
}


def openai_router(front: AppState) -> APIRouter:
    """All routes, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    def card(adapter: str | None = None) -> ModelCard:
        served = front.served()
        return ModelCard(
            id=served.model_id if adapter is None else adapter,
            object="model",
            created=front.started,
            owned_by="tightrope",
            root=served.info.model_id if adapter is None else served.adapters[adapter],
            parent=None if adapter is None else served.model_id,
            max_model_len=served.info.max_model_len,
        )

    @router.get("/models", responses=only(401, 503))
    async def models() -> ModelList:
        """The served model and its adapters."""
        return ModelList(object="list", data=[card(), *map(card, front.served().adapters)])

    @router.get("/models/{model:path}", responses=only(401, 404, 503, "default"))
    async def model(model: str) -> ModelCard:
        """One model; its name may contain slashes."""
        served = front.served()
        return card(check_model(model, served, is_openai=True))

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
