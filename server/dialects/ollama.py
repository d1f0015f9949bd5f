"""Ollama's routes under /api: the model, and generation of prompts and chats as lines of JSON."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Self, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope import __version__
from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import (
    Delta,
    Finish,
    LogprobRequest,
    ModelInfo,
    PromptInfo,
    PromptRead,
    Span,
    TextPrompt,
    Token,
)
from tightrope.server.answering import Dialect, Ending, answer, checked
from tightrope.server.asking import AnswerBody, ask, common, refuse_log_probabilities
from tightrope.server.deltas.choices import Choice
from tightrope.server.fields import structured
from tightrope.server.fields.explain import Explained
from tightrope.server.fields.logprobs import listed
from tightrope.server.fields.names import KNOWN, Ignored
from tightrope.server.fields.progress import prompt_progress
from tightrope.server.http.body import Body, FirstErrorOnly, JsonRoute
from tightrope.server.http.error_docs import STATUS_ERRORS, only, written
from tightrope.server.http.hangup import or_gone
from tightrope.server.prompts.content import Message
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.served import Served, check_model, check_most
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
    logprobs: bool = Field(False, description="List the log probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, description="Alternatives at each token.")

    without_effect = frozenset({"keep_alive"})

    def given(self) -> dict[str, Any]:
        shape = {} if self.format is None else {"format": self.format}
        return super().given() | shape | (self.options.model_extra or {})

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
    logprobs: list[dict[str, Any]] = Field([], description="Absent unless asked for.")
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


T = TypeVar("T", bound=OllamaBody)


class _Ollama(Dialect[T]):
    """Lines of JSON, the last of which tells how it ended."""

    is_lines = True

    @staticmethod
    @abstractmethod
    def wrap(text: str) -> dict[str, Any]:
        """A piece of text in the place that the route has for it."""

    @classmethod
    def _read(cls, front: AppState, body: OllamaBody, prompt: RenderedPrompt, stops: Sequence[str] = ()) -> Self:
        served = front.served()
        check_most("top_logprobs", body.top_logprobs, served.limits.max_logprobs)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        refuse_log_probabilities(body.options.model_extra or {})
        read = replace(
            common(body, served),
            is_stream=body.stream,
            stops=stops,
            logprobs=LogprobRequest(processed=False, top=body.top_logprobs or 0) if body.logprobs else None,
            ignored=body.overruled(),
            notes=prompt.notes,
        )
        spoken = cls(ask("ollama", [TextPrompt(prompt.spans)], read, served))
        spoken.wants_single_tokens = body.logprobs
        return spoken

    @classmethod
    async def _templated(cls, front: AppState, body: OllamaBody, messages: list[Message], request: Request) -> Self:
        template = front.template()
        rendering = template.render(front.renderer, messages, add_generation_prompt=True, continue_final_message=False)
        return cls._read(front, body, await or_gone(request, rendering), template.stops)

    def _line(self, text: str, more: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.asked.model, "created_at": _now(), **self.wrap(text), **more}

    def _listed(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"logprobs": listed(tokens)} if self.wants_single_tokens and tokens else {}

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        line, logprobs = b"", self._listed(delta.tokens)
        if delta.text or logprobs:
            line = encode(self._line(delta.text, {"done": False, **logprobs})) + b"\n"
        if ending is not None and delta.finish is not None:
            told = _ending(ending.prompts[0], checked(delta.finish)) | ending.explained
            line += encode(self._line("", told)) + b"\n"
        return line

    def progress(self, number: int, read: PromptRead) -> bytes:
        return encode(self._line("", {"done": False, "prompt_progress": prompt_progress(read)})) + b"\n"

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        told = _ending(choice.prompt, checked(choice.finish)) | self._listed(choice.tokens)
        return self._line(choice.text, told | ending.explained)


class Generate(_Ollama[OllamaGenerate]):
    """POST /api/generate with a prompt."""

    @classmethod
    async def read(cls, front: AppState, body: OllamaGenerate, request: Request) -> Self:
        if body.raw:
            if body.system:
                raise InvalidRequest("system: a raw prompt is run as it is, so write it into the prompt", "system")
            return cls._read(front, body, RenderedPrompt((Span(body.prompt),)))
        turns = [("system", body.system), ("user", body.prompt)]
        messages: list[Message] = [{"role": role, "content": text} for role, text in turns if text]
        return await cls._templated(front, body, messages, request)

    @staticmethod
    def wrap(text: str) -> dict[str, Any]:
        return {"response": text}


class Chat(_Ollama[OllamaChat]):
    """POST /api/chat with messages."""

    @classmethod
    async def read(cls, front: AppState, body: OllamaChat, request: Request) -> Self:
        messages: list[Message] = [{"role": message.role, "content": message.content} for message in body.messages]
        return await cls._templated(front, body, messages, request)

    @staticmethod
    def wrap(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


def _details(info: ModelInfo) -> ModelDetails:
    return ModelDetails(format=info.format, family=info.architecture, quantization_level=info.format)


def _loaded(body: OllamaBody, served: Served, empty: dict[str, Any]) -> Response:
    name = check_model(body.model, served) or served.model_id
    made = {"model": name, "created_at": _now(), **empty, "done": True, "done_reason": "load"}
    return Response(encode(made) + b"\n", media_type="application/x-ndjson" if body.stream else "application/json")


def ollama_router(front: AppState) -> APIRouter:
    """/api/tags, /api/show, /api/version, /api/generate and /api/chat."""
    router = APIRouter(prefix="/api", route_class=JsonRoute, tags=["Ollama"])
    since = datetime.fromtimestamp(front.started, UTC).isoformat().replace("+00:00", "Z")

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
                OllamaModel(name=name, model=name, modified_at=since, size=0, details=_details(served.info))
                for name in (served.model_id, *served.adapters)
            ]
        )

    @router.post("/show", responses=only(400, 401, 404, 413, 415, 503, "default"))
    async def show(body: ShowBody) -> Shown:
        """The served model, or one of its adapters: its template and its window."""
        served = front.served()
        check_model(body.model or body.name, served)
        info = served.info
        return Shown(
            template=front.template().source,
            details=_details(info),
            model_info={
                "general.architecture": info.architecture,
                f"{info.architecture}.context_length": info.max_model_len,
            },
            capabilities=["completion"],
        )

    @router.post("/generate", **written(model=OllamaAnswer, content=LINES, description="The text."))
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Continue a prompt, or answer it by the chat template unless it is raw."""
        if not body.prompt:
            return _loaded(body, front.served(), Generate.wrap(""))
        return await answer(front, Generate, body, request)

    @router.post("/chat", **written(model=OllamaChatAnswer, content=LINES, description="The answer."))
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Answer a chat."""
        if not body.messages:
            return _loaded(body, front.served(), Chat.wrap(""))
        return await answer(front, Chat, body, request)

    return router
