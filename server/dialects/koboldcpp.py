"""KoboldCpp's routes under /api: versions, token counts, generation whole and streamed, and its abort."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Finish, PromptInfo, Span, TextPrompt
from tightrope.server.deltas.side_by_side import Deltas, run
from tightrope.server.dialects.text import Asked, TextBody, checked, pieces, refuse_log_probabilities, text_request
from tightrope.server.fields.explain import Explained, Explanation, explain, explained
from tightrope.server.http.body import Body, JsonRequest, JsonRoute
from tightrope.server.http.error_docs import CALL_ERRORS, ERRORS, STATUS_ERRORS
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.long_lists import json_answer, json_list, json_object
from tightrope.server.http.sse import event_stream
from tightrope.server.state import AppState

API_VERSION = "1.2.5"  # of KoboldAI United's API, that these routes are shaped after
KOBOLDCPP_VERSION = "1.75"  # whose routes these are; clients stream from 1.30 and count tokens from 1.41 on
DEFAULT_TOKENS = 100

ABORT_BODY = {  # may be left out, and the media type with it
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": {"properties": {"genkey": {"type": "string"}}, "type": "object"}}},
    }
}

encode = msgspec.json.Encoder().encode


class KoboldBody(TextBody):
    """POST /api/v1/generate; sampling fields come under KoboldCpp's or any other names."""

    singleline: bool = Field(False, description="End with the line.")
    render_special: bool = Field(False, description="Show special tokens as text; so does skip_special_tokens: false.")
    genkey: str = Field("", description="What an abort names; without one it stops those that have none either.")
    trim_stop: bool = Field(True, description="Stop strings are always cut; false changes nothing.")

    without_effect = frozenset({"trim_stop"})


class CountBody(Body):
    """POST /api/extra/tokencount."""

    prompt: str
    special: bool = Field(False, description="Whether a BOS is put in front, as it is before a prompt that is run.")


class Counted(BaseModel):
    value: int
    ids: list[int]


class Result(BaseModel):
    result: str


class Version(Result):
    version: str


class Value(BaseModel):
    value: int


class Success(BaseModel):
    success: bool


class KoboldText(BaseModel):
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class KoboldAnswer(BaseModel):
    results: list[KoboldText]
    explain: Explained = {}


class Aborts:
    """Which generations an abort stops: those under the same key."""

    def __init__(self) -> None:
        self._running: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def watch(self, genkey: str) -> Iterator[asyncio.Event]:
        """An event that is set when the key is aborted while the context lasts."""
        aborted = asyncio.Event()
        self._running.setdefault(genkey, set()).add(aborted)
        try:
            yield aborted
        finally:
            self._running[genkey].discard(aborted)
            if not self._running[genkey]:
                del self._running[genkey]

    def abort(self, genkey: str) -> bool:
        """Stop what runs under the key; return whether anything did."""
        running = self._running.get(genkey, set())
        for aborted in running:
            aborted.set()
        return bool(running)


async def until_aborted(deltas: Deltas, aborts: Aborts, genkey: str) -> Deltas:
    """The deltas, up to an abort, at which the work is cancelled."""
    with aborts.watch(genkey) as aborted:
        async with aclosing(deltas):
            stop = asyncio.ensure_future(aborted.wait())
            try:
                while True:
                    step = asyncio.ensure_future(anext(deltas, None))
                    try:
                        await asyncio.wait((step, stop), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        if not step.done():
                            step.cancel()
                            await asyncio.gather(step, return_exceptions=True)
                    if step.cancelled() or (item := step.result()) is None:
                        return
                    yield item
            finally:
                stop.cancel()


def _reason(finish: Finish | None) -> str | None:
    return None if finish is None else "length" if checked(finish).reason == "length" else "stop"


async def _answer(deltas: Deltas, explanation: Explanation | None) -> dict[str, Any]:
    """What was written, be it finished or aborted."""
    text, finish, num_tokens = "", None, 0
    prompt: PromptInfo | None = None
    async with aclosing(deltas):
        async for _, delta in deltas:
            text += delta.text
            finish = delta.finish
            prompt = delta.prompt or prompt
            num_tokens += len(delta.tokens)
    result = {
        "text": text,
        "finish_reason": _reason(finish) or "stop",
        "prompt_tokens": 0 if prompt is None else prompt.num_tokens,
        "completion_tokens": num_tokens,
    }
    return {"results": [result], **explained(explanation, prompt)}


async def _events(deltas: Deltas, explanation: Explanation | None) -> AsyncGenerator[bytes, None]:
    prompt: PromptInfo | None = None
    async with aclosing(deltas):
        async for _, delta in deltas:
            prompt = delta.prompt or prompt
            if delta.text or delta.finish is not None:
                event: dict[str, Any] = {"token": delta.text, "finish_reason": _reason(delta.finish)}
                if delta.finish is not None:
                    event |= explained(explanation, prompt)
                yield b"event: message\ndata: %b\n\n" % encode(event)


def koboldcpp_router(front: AppState) -> APIRouter:
    """/api/v1 and /api/extra."""
    router = APIRouter(prefix="/api", route_class=JsonRoute, tags=["KoboldCpp"])
    aborts = Aborts()

    async def prepared(body: KoboldBody, request: Request) -> tuple[Asked, Explanation | None]:
        served = front.served()
        if body.render_special:
            body = body.model_copy(update={"skip_special_tokens": False})
        fields = body.model_extra or {}
        refuse_log_probabilities(fields)
        asked = text_request(
            body,
            fields,
            body.checked_prompt(served),
            served,
            max_tokens=DEFAULT_TOKENS,
            stops=("\n",) if body.singleline else (),
        )
        if not body.explain:
            return asked, None
        return asked, await explain(front, [asked.request], asked.ignored, request)

    @router.get("/v1/info/version", responses=STATUS_ERRORS)
    async def api_version() -> Result:
        """The version of the API that these routes follow."""
        return Result(result=API_VERSION)

    @router.get("/extra/version", responses=STATUS_ERRORS)
    async def version() -> Version:
        """The KoboldCpp whose routes these are."""
        return Version(result="KoboldCpp", version=KOBOLDCPP_VERSION)

    @router.get("/v1/model", responses=STATUS_ERRORS)
    async def model() -> Result:
        """The served model."""
        return Result(result=f"koboldcpp/{front.served().model_id}")

    @router.get("/v1/config/max_context_length", responses=STATUS_ERRORS)
    @router.get("/extra/true_max_context_length", responses=STATUS_ERRORS)
    async def max_context_length() -> Value:
        """The window in tokens."""
        return Value(value=front.info().max_model_len)

    @router.post("/extra/tokencount", responses=CALL_ERRORS, response_model=Counted)
    async def tokencount(body: CountBody) -> Response:
        """The token ids of a text. The counts of a prompt's pieces add up unless `special` is set."""
        tokens = await front.client.tokenize(TextPrompt((Span(body.prompt),), body.special))
        return json_answer(json_object({"value": len(tokens), "ids": await json_list(tokens.ids)}))

    @router.post("/extra/abort", responses=CALL_ERRORS, openapi_extra=ABORT_BODY)
    async def abort(request: Request) -> Success:
        """Stop the generations under the body's `genkey`, or those without one. Closing a connection does the same."""
        headers = request.headers
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        data = (await JsonRequest.read(request)).data if has_body else None
        genkey = data.get("genkey") or "" if isinstance(data, dict) else ""
        if not isinstance(genkey, str):
            raise InvalidRequest("genkey must be a string", "genkey")
        return Success(success=aborts.abort(genkey))

    @router.post(
        "/v1/generate",
        response_model=None,
        responses={**ERRORS, 200: {"model": KoboldAnswer, "description": "The text."}},
    )
    async def generate(body: KoboldBody, request: Request) -> Response:
        """Continue a prompt; an abort gives what was written so far."""
        asked, explanation = await prepared(body, request)
        deltas = until_aborted(run(front.generate_for(request), [asked.request]), aborts, body.genkey)
        answer = await or_gone(request, _answer(deltas, explanation))
        return Response(encode(answer), media_type="application/json")

    @router.post(
        "/extra/generate/stream",
        response_model=None,
        responses={**ERRORS, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def generate_stream(body: KoboldBody, request: Request) -> Response:
        """Continue a prompt, one event for each piece of text."""
        asked, explanation = await prepared(body, request)
        deltas = until_aborted(await pieces(front, asked, request), aborts, body.genkey)
        return event_stream(_events(deltas, explanation), "openai")

    return router
