"""The routes of the Messages API."""

from typing import Any

from fastapi import APIRouter, Request, Response

from tightrope.engine.types import TextPrompt
from tightrope.server.answering import answer
from tightrope.server.dialects.anthropic.bodies import (
    AnthropicError,
    CountedTokens,
    CountTokensRequest,
    MessagesAnswer,
    MessagesRequest,
)
from tightrope.server.dialects.anthropic.reading import NAMES, offer, rendered
from tightrope.server.dialects.anthropic.writing import Messages
from tightrope.server.fields.renaming import renamed
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import ERRORS, Documented, written
from tightrope.server.served import check_model
from tightrope.server.state import AppState

EVENTS: dict[str, Any] = {
    "text/event-stream": {"example": 'event: message_start\ndata: {"type": "message_start", ...}\n\n'}
}
FAULTS: Documented = {status: row | {"model": AnthropicError} for status, row in ERRORS.items()}


def anthropic_router(front: AppState) -> APIRouter:
    """All routes, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["Anthropic"])

    @router.post(
        "/messages",
        **written(FAULTS, model=MessagesAnswer, content=EVENTS, description="The answer, whole or as events."),
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a chat."""
        return await answer(front, Messages, body, request)

    counted: Documented = {status: row for status, row in FAULTS.items() if status not in (429, 500)}

    @router.post("/messages/count_tokens", responses=counted)
    async def count_tokens(body: CountTokensRequest, request: Request) -> CountedTokens:
        """How many tokens the prompt of such a chat has."""
        chosen = await front.at(request, body.named_model)
        with renamed(NAMES):
            chat, _ = await rendered(chosen, body, offer(body), request)
        adapter = check_model(body.model, chosen.served())
        tokens = await chosen.engine.tokenize(TextPrompt(chat.prompt.spans), adapter)
        return CountedTokens(input_tokens=len(tokens))

    return router
