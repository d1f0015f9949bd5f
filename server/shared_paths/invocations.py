"""SageMaker's one route for everything: the body's shape says which API is meant."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Tag

from tightrope.server.answering import answer
from tightrope.server.dialects.openai.answers import ChatAnswer, CompletionAnswer
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.dialects.openai.routes import EVENTS
from tightrope.server.dialects.openai.writing import Chat, Completions
from tightrope.server.dialects.tgi.requests import CompatBody, GenerateAnswer
from tightrope.server.dialects.tgi.writing import Compat
from tightrope.server.http.body import JsonRoute, by_key
from tightrope.server.http.error_docs import ERRORS, TGI_ERRORS, Documented, ErrorAnswer, ErrorText
from tightrope.server.state import AppState

BOTH: Documented = {
    **ERRORS,
    200: {
        "model": list[GenerateAnswer] | ChatAnswer | CompletionAnswer,
        "content": EVENTS,
        "description": "What the route that the body is made for answers.",
    },
    422: TGI_ERRORS[422],
    424: TGI_ERRORS[424],
    429: {**ERRORS[429], "model": ErrorAnswer | ErrorText},
}


AnyBody = Annotated[
    Annotated[CompatBody, Tag("<inputs>")]
    | Annotated[ChatRequest, Tag("<messages>")]
    | Annotated[CompletionRequest, Tag("<prompt>")],
    by_key("inputs", "messages", "prompt"),
]


def invocations_router(front: AppState) -> APIRouter:
    """POST /invocations."""
    router = APIRouter(route_class=JsonRoute, tags=["TGI"])

    @router.post("/invocations", response_model=None, responses=BOTH)
    async def invocations(body: AnyBody, request: Request) -> Response:
        """Answer as POST /, /v1/chat/completions or /v1/completions do to the same body."""
        if isinstance(body, CompatBody):
            return await answer(front, Compat, body, request)
        if isinstance(body, ChatRequest):
            return await answer(front, Chat, body, request)
        return await answer(front, Completions, body, request)

    return router
