"""The routes of the Responses API."""

from fastapi import APIRouter, Request, Response

from tightrope.engine.types import TextPrompt
from tightrope.server.answering import answer
from tightrope.server.dialects.responses.answers import InputTokens, ResponsesAnswer
from tightrope.server.dialects.responses.items import NOT_STORED
from tightrope.server.dialects.responses.reading import NAMES, check, offer, rendered
from tightrope.server.dialects.responses.requests import ResponsesRequest
from tightrope.server.dialects.responses.writing import Responses
from tightrope.server.fields import structured
from tightrope.server.fields.names import KNOWN
from tightrope.server.fields.renaming import renamed
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import only, written
from tightrope.server.http.errors import NoSuchRoute
from tightrope.server.served import check_model
from tightrope.server.state import AppState

EVENTS = {"text/event-stream": {"example": 'event: response.created\ndata: {"type": "response.created", ...}\n\n'}}


class CountedResponse(ResponsesRequest):
    """POST /v1/responses/input_tokens: how the answer is to be written changes nothing."""

    without_effect = frozenset(
        {*KNOWN, *structured.NAMES, *ResponsesRequest.model_fields}
        - {"input", "instructions", "tools", "tool_choice", "reasoning", "truncation", "text", "model"}
        - {"previous_response_id", "conversation", "background"}
    )


def responses_router(front: AppState) -> APIRouter:
    """All routes, relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post(
        "/responses", **written(model=ResponsesAnswer, content=EVENTS, description="The answer, whole or as events.")
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, which comes whole with each request."""
        return await answer(front, Responses, body, request)

    @router.post("/responses/input_tokens", responses=only(400, 401, 404, 413, 415, 503, "default"))
    async def input_tokens(body: CountedResponse, request: Request) -> InputTokens:
        """How many tokens the prompt of such a request has."""
        chosen = await front.at(request, body.named_model)
        with renamed(NAMES):
            check(body, chosen)
            chat, _ = await rendered(chosen, body, offer(body), request)
        adapter = check_model(body.model, chosen.served())
        tokens = await chosen.engine.tokenize(TextPrompt(chat.prompt.spans), adapter)
        return InputTokens(object="response.input_tokens", input_tokens=len(tokens))

    @router.api_route("/responses/{stored:path}", methods=["GET", "DELETE"], include_in_schema=False)
    async def nothing_stored(stored: str) -> None:
        raise NoSuchRoute(f"there is no response {stored[:80]!r}: {NOT_STORED}")

    return router
