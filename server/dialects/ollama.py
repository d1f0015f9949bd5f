"""Ollama's routes under /api: the model, and generation of prompts and chats as lines of JSON."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope import __version__
from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Finish, Prompt, PromptInfo, Span, TextPrompt
from tightrope.server.deltas.side_by_side import Deltas
from tightrope.server.dialects.openai.requests import AnswerBody
from tightrope.server.dialects.text import (
    Asked,
    checked,
    model_name,
    pieces,
    refuse_log_probabilities,
    text_request,
    whole,
)
from tightrope.server.fields import structured
from tightrope.server.fields.explain import Explained, Explanation, explain, explained
from tightrope.server.fields.sampling import KNOWN, Ignored
from tightrope.server.http.body import Body, FirstErrorOnly, JsonRoute
from tightrope.server.http.error_docs import ERRORS, STATUS_ERRORS
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.sse import line_stream
from tightrope.server.served import check_model
from tightrope.server.state import AppState

encode = msgspec.json.Encoder().encode
LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}


class OllamaOptions(Body):
    """Sampling and the answer's shape, under Ollama's or any other names."""

    read_elsewhere = KNOWN | structured.NAMES


class OllamaBody(AnswerBody):
    """What both kinds of request have in common. What `options` may hold is taken beside them, too."""

    stream: bool = Field(True, description="Lines of JSON as they come; false gives one object.")
    options: OllamaOptions = OllamaOptions()
    keep_alive: int | float | str | None = Field(None, description="The model stays loaded: changes nothing.")
    format: str | dict[str, Any] | None = Field(None, description="json or a JSON schema.")

    without_effect = frozenset({"keep_alive"})

    def fields(self) -> dict[str, Any]:
        """Sampling and shape, from wherever they stand."""
        shape = {} if self.format is None else {"format": self.format}
        return (self.model_extra or {}) | shape | (self.options.model_extra or {})

    def overruled(self) -> list[Ignored]:
        """The fields that stand beside the options and say something else than they."""
        options = self.options.model_extra or {}
        beside = (self.model_extra or {}) | {"format": self.format}
        differ = [name for name in beside if options.get(name) not in (None, beside[name])]
        return [(name, "the options have it too, and count") for name in differ if beside[name] is not None]


class OllamaGenerate(OllamaBody):
    """POST /api/generate."""

    prompt: str = Field("", description="Without one the model is named as loaded.")
    system: str | None = None
    raw: bool = Field(False, description="Run the prompt as it is, without the chat template.")


class OllamaMessage(Body):
    """One turn of the chat."""

    role: str
    content: str = ""


class OllamaChat(OllamaBody):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], FirstErrorOnly()] = Field([])


class ModelDetails(BaseModel):
    format: str
    family: str
    quantization_level: str


class OllamaModel(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    details: ModelDetails


class OllamaModels(BaseModel):
    models: list[OllamaModel]


class ShowBody(Body):
    """POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="The older name of model.")


class Shown(BaseModel):
    template: str
    details: ModelDetails
    model_info: dict[str, str | int]
    capabilities: list[str]


class _Answer(BaseModel):
    """What the answers of both routes have, and their lines."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    explain: Explained = {}


class OllamaAnswer(_Answer):
    """The answer to /api/generate, or one of its lines."""

    response: str


class OllamaChatAnswer(_Answer):
    """The answer to /api/chat, or one of its lines."""

    message: OllamaMessage


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _ending(prompt: PromptInfo, finish: Finish) -> dict[str, Any]:
    """Times in nanoseconds."""
    times = finish.timings
    return {
        "done": True,
        "done_reason": "length" if finish.reason == "length" else "stop",
        "total_duration": round(1e9 * (times.queue_s + times.prefill_s + times.decode_s)),
        "load_duration": 0,
        "prompt_eval_count": prompt.num_tokens,
        "prompt_eval_duration": round(1e9 * times.prefill_s),
        "eval_count": finish.num_tokens,
        "eval_duration": round(1e9 * times.decode_s),
    }


Wrap = Callable[[str], dict[str, Any]]  # a piece of text in the place that the route has for it


def _response(text: str) -> dict[str, Any]:
    return {"response": text}


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


async def _lines(
    deltas: Deltas, model: str, wrap: Wrap, explanation: Explanation | None
) -> AsyncGenerator[bytes, None]:
    prompt: PromptInfo | None = None
    async with aclosing(deltas):
        async for _, delta in deltas:
            prompt = delta.prompt or prompt
            if delta.text:
                yield encode({"model": model, "created_at": _now(), **wrap(delta.text), "done": False}) + b"\n"
            if delta.finish is not None:
                assert prompt is not None, "the first delta tells of the prompt"
                ending = _ending(prompt, checked(delta.finish)) | explained(explanation, prompt)
                yield encode({"model": model, "created_at": _now(), **wrap(""), **ending}) + b"\n"


def ollama_router(front: AppState) -> APIRouter:
    """/api/tags, /api/show, /api/version, /api/generate and /api/chat."""
    router = APIRouter(prefix="/api", route_class=JsonRoute, tags=["Ollama"])
    since = datetime.fromtimestamp(front.started, UTC).isoformat().replace("+00:00", "Z")

    def details() -> ModelDetails:
        info = front.info()
        return ModelDetails(format=info.format, family=info.architecture, quantization_level=info.format)

    async def answer(
        body: OllamaBody, asked: Asked, request: Request, wrap: Wrap, notes: tuple[str, ...] = ()
    ) -> Response:
        model = model_name(asked, front.served())
        explanation = await explain(front, [asked.request], asked.ignored, request, notes) if body.explain else None
        if body.stream:
            return line_stream(_lines(await pieces(front, asked, request), model, wrap, explanation))
        choice = await whole(front, asked, request)
        made = {"model": model, "created_at": _now(), **wrap(choice.text), **_ending(choice.prompt, choice.finish)}
        return Response(encode(made | explained(explanation, choice.prompt)), media_type="application/json")

    def loaded(body: OllamaBody, wrap: Wrap) -> Response:
        served = front.served()
        name = check_model(body.model, served) or served.model_id
        made = {"model": name, "created_at": _now(), **wrap(""), "done": True, "done_reason": "load"}
        return Response(encode(made) + b"\n", media_type="application/x-ndjson" if body.stream else "application/json")

    async def templated(
        body: OllamaBody, messages: list[dict[str, Any]], request: Request
    ) -> tuple[Asked, tuple[str, ...]]:
        """What a chat asks for, and notes on how it became a prompt."""
        template = front.template()
        rendering = template.render(front.renderer, messages, add_generation_prompt=True, continue_final_message=False)
        rendered = await or_gone(request, rendering)
        return request_of(body, TextPrompt(rendered.spans), template.stops), rendered.notes

    def request_of(body: OllamaBody, prompt: Prompt, stops: Sequence[str] = ()) -> Asked:
        fields = body.fields()
        refuse_log_probabilities(fields)
        asked = text_request(body, fields, prompt, front.served(), stops=stops)
        return replace(asked, ignored=[*asked.ignored, *body.overruled()])

    @router.get("/version")
    async def version() -> dict[str, str]:
        """This server's version."""
        return {"version": __version__}

    @router.get("/tags", responses=STATUS_ERRORS)
    async def tags() -> OllamaModels:
        """The models: the one that is served, and its adapters."""
        served = front.served()
        return OllamaModels(
            models=[
                OllamaModel(name=name, model=name, modified_at=since, size=0, details=details())
                for name in (served.model_id, *served.adapters)
            ]
        )

    @router.post("/show", responses={key: ERRORS[key] for key in (400, 401, 404, 413, 415, 503, "default")})
    async def show(body: ShowBody) -> Shown:
        """The served model, or one of its adapters: its template and its window."""
        served = front.served()
        check_model(body.model or body.name, served)
        info = served.info
        return Shown(
            template=front.template().source,
            details=details(),
            model_info={
                "general.architecture": info.architecture,
                f"{info.architecture}.context_length": info.max_model_len,
            },
            capabilities=["completion"],
        )

    @router.post(
        "/generate",
        response_model=None,
        responses={**ERRORS, 200: {"model": OllamaAnswer, "content": LINES, "description": "The text."}},
    )
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Continue a prompt, or answer it by the chat template unless it is raw."""
        if not body.prompt:
            return loaded(body, _response)
        if body.raw:
            if body.system:
                raise InvalidRequest("system: a raw prompt is run as it is, so write it into the prompt", "system")
            asked = request_of(body, TextPrompt((Span(body.prompt),)))
            return await answer(body, asked, request, _response)
        turns = [("system", body.system), ("user", body.prompt)]
        messages = [{"role": role, "content": text} for role, text in turns if text]
        asked, notes = await templated(body, messages, request)
        return await answer(body, asked, request, _response, notes)

    @router.post(
        "/chat",
        response_model=None,
        responses={**ERRORS, 200: {"model": OllamaChatAnswer, "content": LINES, "description": "The answer."}},
    )
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Answer a chat."""
        if not body.messages:
            return loaded(body, _message)
        messages = [{"role": message.role, "content": message.content} for message in body.messages]
        asked, notes = await templated(body, messages, request)
        return await answer(body, asked, request, _message, notes)

    return router
