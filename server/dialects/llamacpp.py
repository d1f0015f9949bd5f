"""llama.cpp's server: /completion, /props, /slots, loading of models. Others share its /tokenize and /detokenize."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import msgspec
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.types import Delta, Finish, LogprobRequest, PromptInfo, PromptRead, Token
from tightrope.server.answering import Dialect, Ending, answer, checked
from tightrope.server.asking import TextBody, ask, common
from tightrope.server.deltas.choices import Choice
from tightrope.server.fields.explain import Explained
from tightrope.server.fields.logprobs import finite, token_name
from tightrope.server.fields.progress import prompt_progress
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import MODEL_ERRORS, only, written
from tightrope.server.http.hangup import or_gone
from tightrope.server.served import check_most
from tightrope.server.state import AppState

encode = msgspec.json.Encoder().encode


class CompletionBody(TextBody):
    """POST /completion; n_predict, stop and the sampling fields come under llama.cpp's or any other names."""

    stream: bool = False
    n_probs: int = Field(0, ge=0, description="Alternatives listed at each token.")
    cache_prompt: bool = Field(True, description="Found tokens are always reused; false changes nothing.")

    without_effect = frozenset({"cache_prompt"})


class Completion(BaseModel):
    """The answer, and the last event of a stream, where `content` is empty."""

    index: int
    content: str
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    stop_type: str = Field(description="eos, limit or word.")
    stopping_word: str
    stopped_eos: bool
    stopped_word: bool
    stopped_limit: bool
    truncated: bool
    timings: dict[str, float]
    completion_probabilities: list[dict[str, Any]] = Field([], description="Absent unless asked for.")
    explain: Explained = {}


class Generation(BaseModel):
    n_ctx: int
    model: str


class Props(BaseModel):
    """GET /props."""

    default_generation_settings: Generation
    total_slots: int
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str


class Slot(BaseModel):
    id: int
    n_ctx: int
    is_processing: bool


class ModelBody(Body):
    """POST /models/load and /models/unload."""

    model: str


class Success(BaseModel):
    success: bool = True


MODEL = Query(None, description="Which model; the one that was used last without it.")
LOAD_ERRORS = only(400, 401, 404, 413, 415, 429, 500, 503, "default")


def probabilities(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """The alternatives at each token, in the old form (`probs`) and in the new one (`top_logprobs`)."""
    listed = []
    for token in tokens:
        name = token_name(token.raw)
        top = {token_name(other.raw): finite(other.logprob) for other in token.top}
        listed.append(
            {
                "id": token.token_id,
                "token": name,
                "content": name,
                "logprob": finite(token.logprob),
                "probs": [{"tok_str": text, "prob": math.exp(logprob)} for text, logprob in top.items()],
                "top_logprobs": [{"token": text, "logprob": logprob} for text, logprob in top.items()],
            }
        )
    return listed


def _ending(content: str, prompt: PromptInfo, finish: Finish, model: str) -> dict[str, Any]:
    stop_type = {"length": "limit", "stop_string": "word"}.get(finish.reason, "eos")
    times = finish.timings
    num_computed = prompt.num_tokens - prompt.num_cached
    return {
        "index": 0,
        "content": content,
        "id_slot": 0,
        "stop": True,
        "model": model,
        "tokens_predicted": finish.num_tokens,
        "tokens_evaluated": prompt.num_tokens,
        "tokens_cached": prompt.num_cached,
        "stop_type": stop_type,
        "stopping_word": finish.matched if finish.reason == "stop_string" else "",
        "stopped_eos": stop_type == "eos",
        "stopped_word": stop_type == "word",
        "stopped_limit": stop_type == "limit",
        "truncated": False,
        "timings": {
            "prompt_n": num_computed,
            "prompt_ms": 1e3 * times.prefill_s,
            "predicted_n": finish.num_tokens,
            "predicted_ms": 1e3 * times.decode_s,
        },
    }


class LlamaCpp(Dialect[CompletionBody]):
    """POST /completion."""

    @classmethod
    async def read(cls, front: AppState, body: CompletionBody, request: Request) -> Self:
        served = front.served()
        check_most("n_probs", body.n_probs, served.limits.max_logprobs)
        read = replace(
            common(body, served),
            is_stream=body.stream,
            logprobs=LogprobRequest(processed=False, top=body.n_probs) if body.n_probs else None,
        )
        spoken = cls(ask("llama", [body.checked_prompt(served, read.adapter)], read, served))
        spoken.wants_single_tokens = body.n_probs > 0
        return spoken

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        piece = b""
        has_probs = self.wants_single_tokens and delta.tokens
        if delta.text or has_probs:
            event: dict[str, Any] = {"index": 0, "content": delta.text, "id_slot": 0, "stop": False}
            if self.wants_single_tokens:
                event["completion_probabilities"] = probabilities(delta.tokens)
            piece = b"data: %b\n\n" % encode(event)
        if ending is not None and delta.finish is not None:
            last = _ending("", ending.prompts[0], checked(delta.finish), self.asked.model)
            piece += b"data: %b\n\n" % encode(last | ending.explained)
        return piece

    def progress(self, number: int, read: PromptRead) -> bytes:
        event = {"index": 0, "content": "", "id_slot": 0, "stop": False, "prompt_progress": prompt_progress(read)}
        return b"data: %b\n\n" % encode(event)

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        answer = _ending(choice.text, choice.prompt, checked(choice.finish), self.asked.model)
        if self.wants_single_tokens:
            answer["completion_probabilities"] = probabilities(choice.tokens)
        return answer | ending.explained


EVENTS = {"text/event-stream": {"example": 'data: {"content": "...", "stop": false, ...}\n\n'}}


def llamacpp_router(front: AppState) -> APIRouter:
    """/completion, /props and /slots, and the two of models; /models itself is OpenAI's."""
    router = APIRouter(route_class=JsonRoute, tags=["llama.cpp"])

    @router.post(
        "/completion", **written(model=Completion, content=EVENTS, description="The text, whole or as events.")
    )
    async def completion(body: CompletionBody, request: Request) -> Response:
        """Continue a prompt."""
        return await answer(front, LlamaCpp, body, request)

    @router.post("/models/load", responses=LOAD_ERRORS)
    @router.post("/v1/models/load", responses=LOAD_ERRORS)
    async def load(body: ModelBody, request: Request) -> Success:
        """Load a model; answered when it is loaded."""
        await or_gone(request, front.models.load(body.model))
        return Success()

    @router.post("/models/unload", responses=LOAD_ERRORS)
    @router.post("/v1/models/unload", responses=LOAD_ERRORS)
    async def unload(body: ModelBody, request: Request) -> Success:
        """Unload a model once the answers under way have finished; who asks for it loads it again."""
        await or_gone(request, front.models.unload(body.model))
        return Success()

    @router.get("/props", responses=MODEL_ERRORS)
    async def props(request: Request, model: str | None = MODEL) -> Props:
        """The window and the chat template, from which clients set themselves up."""
        chosen = front if model is None else await front.at(request, model)
        served = chosen.served()
        info = served.info
        return Props(
            default_generation_settings=Generation(n_ctx=info.max_model_len, model=served.model_id),
            total_slots=info.max_num_seqs,
            model_path=served.model_id,
            chat_template=chosen.template().source,
            bos_token=info.bos_token or "",
            eos_token=info.eos_token or "",
        )

    @router.get("/slots", responses=MODEL_ERRORS)
    async def slots(request: Request, model: str | None = MODEL) -> list[Slot]:
        """How many of the answers that can be written at the same time are being written."""
        chosen = front if model is None else await front.at(request, model)
        info, stats = chosen.info(), chosen.engine.stats
        return [
            Slot(id=number, n_ctx=info.max_model_len, is_processing=number < stats.num_running)
            for number in range(info.max_num_seqs)
        ]

    return router
