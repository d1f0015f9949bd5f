"""KoboldCpp's routes under /api: versions, token counts, generation whole and streamed, and its abort."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.types import Delta, Finish, GenerateRequest, Prompt, PromptRead, Span, TextPrompt, TokenPrompt
from tightrope.server.answering import Dialect, Ending, answer, checked
from tightrope.server.asking import TextBody, ask, common, refuse_log_probabilities
from tightrope.server.deltas.choices import Choice
from tightrope.server.fields.explain import Explained
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.fields.progress import prompt_progress
from tightrope.server.http.body import AnyTypeRoute, Body
from tightrope.server.http.error_docs import CALL_ERRORS, STATUS_ERRORS, only, written
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.long_lists import json_answer, json_list
from tightrope.server.served import Served
from tightrope.server.state import AppState
from tightrope.server.vectors.asking import CUT, Inputs, embed, texts_of
from tightrope.server.vectors.writing import EmbeddingList, openai_list

API_VERSION = "1.2.5"  # KoboldAI United's API has this version, and these routes are shaped after it.
KOBOLDCPP_VERSION = "1.75"  # These are its routes; clients stream from 1.30 and count tokens from 1.41 on.
DEFAULT_TOKENS = 100
UNLOAD = "unload_model"  # Among the names of models it stands for none.
LOAD_ERRORS = only(400, 401, 404, 413, 429, 500, 503, "default")

encode = msgspec.json.Encoder().encode


class KoboldBody(TextBody):
    """POST /api/v1/generate; sampling fields come under KoboldCpp's or any other names."""

    singleline: bool = Field(False, description="End with the line.")
    render_special: bool = Field(False, description="Show special tokens as text; so does skip_special_tokens: false.")
    genkey: str = Field("", description="What an abort names; without one it stops those that have none either.")
    trim_stop: bool = Field(True, description="Cut the stop string off; false leaves it at the end.")
    memory: str = Field("", description="Text in front of the prompt, which is kept when the prompt is cut.")
    max_context_length: int | None = Field(None, ge=1, description="A longer prompt loses its oldest text.")

    def given(self) -> dict[str, Any]:
        return ({} if self.trim_stop else {"include_stop_str_in_output": True}) | super().given()


class KoboldEmbeddings(Body):
    """POST /api/extra/embeddings."""

    input: Inputs = Field(description="A text, its token ids, or a list of either.")
    model: str | None = None
    truncate: bool = Field(True, description="Cut texts that are too long; false refuses them.")
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Cut vectors to so many numbers.")


class CountBody(Body):
    """POST /api/extra/tokencount."""

    prompt: str
    special: bool = Field(False, description="Whether a BOS is put in front, as it is before a prompt that is run.")


class ReloadBody(Body):
    """POST /api/admin/reload_config."""

    filename: str = Field(description="One of /api/admin/list_options.")


class Counted(BaseModel):
    value: int
    ids: list[int]


class Result(BaseModel):
    result: str


class Version(Result):
    version: str
    embeddings: bool = Field(description="Whether /api/extra/embeddings has a model.")


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


def _prompt(body: KoboldBody, served: Served, adapter: str | None) -> Prompt:
    """Memory and prompt. Raises InvalidRequest where there is neither."""
    if not body.memory or not isinstance(body.prompt, str):
        return body.checked_prompt(served, adapter)
    spans = (Span(body.memory), Span(body.prompt)) if body.prompt else (Span(body.memory),)
    return TextPrompt(spans, body.add_bos_token and body.add_special_tokens)


async def _fitted(front: AppState, body: KoboldBody, request: GenerateRequest) -> GenerateRequest:
    """The request with so much of its prompt's end as there is room for, behind the memory, and the BOS if it has one.

    The answer's tokens are kept free, but no more than half of the window for their sake.
    """
    window = front.info().max_model_len
    window = min(window, body.max_context_length or window)
    answer = window // 2 if request.stop.max_tokens is None else min(request.stop.max_tokens, window // 2)
    room = max(1, window - answer)
    is_text = isinstance(body.prompt, str)
    if (
        isinstance(body.prompt, str) and len((body.memory + body.prompt).encode()) < room
    ):  # A token has a byte at least.
        return request
    adds_bos = body.add_bos_token and body.add_special_tokens and (is_text or bool(body.memory))
    head = TextPrompt((Span(body.memory),), adds_bos)
    memory = (await front.engine.tokenize(head, request.adapter, last=room)).ids
    rest: Sequence[int]
    if isinstance(body.prompt, str):
        text = TextPrompt((Span(body.prompt),), add_bos=False)
        rest = (await front.engine.tokenize(text, request.adapter, last=room + 1)).ids
    else:
        rest = body.prompt
    fits = len(memory) + len(rest) <= room
    if fits and (is_text or not body.memory):
        return request
    kept = room - len(memory)
    return msgspec.structs.replace(request, prompt=TokenPrompt((*memory, *(rest[-kept:] if kept else ()))))


class Kobold(Dialect[KoboldBody]):
    """POST /api/v1/generate. An aborted answer is what was written so far, and an aborted stream ends there."""

    @classmethod
    async def read(cls, front: AppState, body: KoboldBody, request: Request) -> Self:
        served = front.served()
        if body.render_special:
            body = body.model_copy(update={"skip_special_tokens": False})
        refuse_log_probabilities(body.given())
        read = replace(
            common(body, served),
            is_stream=cls.is_stream,
            max_tokens=DEFAULT_TOKENS,
            stops=("\n",) if body.singleline else (),
        )
        asked = ask("kobold", [_prompt(body, served, read.adapter)], read, served)
        fitted = await or_gone(request, _fitted(front, body, asked.requests[0]))
        if fitted is not asked.requests[0]:
            asked = replace(
                asked, requests=[fitted], bent=[*asked.bent, ("prompt", "memory and as much of its end as fits")]
            )
        spoken = cls(asked)
        spoken.abort_key = body.genkey
        return spoken

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        if not delta.text and delta.finish is None:
            return b""
        event: dict[str, Any] = {"token": delta.text, "finish_reason": _reason(delta.finish)}
        if ending is not None:
            event |= ending.explained
        return b"event: message\ndata: %b\n\n" % encode(event)

    def progress(self, number: int, read: PromptRead) -> bytes:
        event = {"token": "", "finish_reason": None, "prompt_progress": prompt_progress(read)}
        return b"event: message\ndata: %b\n\n" % encode(event)

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        result = {
            "text": choice.text,
            "finish_reason": _reason(choice.finish),
            "prompt_tokens": choice.prompt.num_tokens,
            "completion_tokens": len(choice.tokens),
        }
        return {"results": [result], **ending.explained}


class KoboldStream(Kobold):
    """POST /api/extra/generate/stream."""

    is_stream = True


def _reason(finish: Finish | None) -> str | None:
    return None if finish is None else "length" if checked(finish).reason == "length" else "stop"


EVENTS = {"text/event-stream": {"example": 'event: message\ndata: {"token": "...", "finish_reason": null}\n\n'}}


def koboldcpp_router(front: AppState) -> APIRouter:
    """/api/v1 and /api/extra."""
    router = APIRouter(prefix="/api", route_class=AnyTypeRoute, tags=["KoboldCpp"])

    @router.get("/v1/info/version", responses=STATUS_ERRORS)
    async def api_version() -> Result:
        """The version of the API that these routes follow."""
        return Result(result=API_VERSION)

    @router.get("/extra/version", responses=STATUS_ERRORS)
    async def version() -> Version:
        """The KoboldCpp whose routes these are."""
        return Version(
            result="KoboldCpp",
            version=KOBOLDCPP_VERSION,
            embeddings=any(card.kind == "embedding" for card in front.embedder.cards),
        )

    @router.get("/v1/model", responses=STATUS_ERRORS)
    async def model() -> Result:
        """The served model."""
        return Result(result=f"koboldcpp/{front.served().model_id}")

    @router.get("/v1/config/max_context_length", responses=STATUS_ERRORS)
    @router.get("/extra/true_max_context_length", responses=STATUS_ERRORS)
    async def max_context_length() -> Value:
        """The window in tokens."""
        return Value(value=front.info().max_model_len)

    @router.get("/admin/list_options", responses=STATUS_ERRORS)
    async def list_options() -> list[str]:
        """The models that may be loaded, and the word that unloads."""
        front.models.check_known()
        return [*(model.name for model in front.models.all), UNLOAD]

    @router.post("/admin/reload_config", responses=LOAD_ERRORS)
    async def reload_config(body: ReloadBody, request: Request) -> Success:
        """Load a model; answered when it is loaded."""
        if body.filename == UNLOAD:
            await or_gone(request, front.models.unload(front.model.name))
        else:
            await or_gone(request, front.models.load(body.filename))
        return Success(success=True)

    @router.post("/extra/tokencount", responses=CALL_ERRORS, response_model=Counted)
    async def tokencount(body: CountBody, request: Request) -> Response:
        """The token ids of a text. The counts of a prompt's pieces add up unless `special` is set."""
        chosen = await front.at(request, body.named_model)
        tokens = await chosen.engine.tokenize(TextPrompt((Span(body.prompt),), body.special))
        return json_answer({"value": len(tokens), "ids": await json_list(tokens.ids)})

    @router.post("/extra/embeddings", **written(model=EmbeddingList, description="A vector for each text."))
    async def embeddings(body: KoboldEmbeddings, request: Request) -> Response:
        """Vectors of texts, of length 1."""
        texts, cut = texts_of(body.input, "input"), CUT[body.truncate]
        card, vectors = await embed(front, request, texts, model=body.model, cut=cut, dimensions=body.dimensions)
        return await openai_list(card, vectors, "float")

    @router.post("/v1/generate", **written(model=KoboldAnswer, description="The text."))
    async def generate(body: KoboldBody, request: Request) -> Response:
        """Continue a prompt; an abort gives what was written so far."""
        return await answer(front, Kobold, body, request)

    @router.post("/extra/generate/stream", **written(content=EVENTS, description="One event for each piece of text."))
    async def generate_stream(body: KoboldBody, request: Request) -> Response:
        """Continue a prompt, one event for each piece of text."""
        return await answer(front, KoboldStream, body, request)

    return router
