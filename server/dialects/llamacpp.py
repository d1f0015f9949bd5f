"""llama.cpp's server: POST /completion, GET /props and /slots. Its /tokenize and /detokenize are shared with others."""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.types import Finish, PromptInfo, Token
from tightrope.server.deltas.one_token import one_token_each
from tightrope.server.deltas.side_by_side import Deltas
from tightrope.server.dialects.text import TextBody, checked, model_name, pieces, text_request, whole
from tightrope.server.fields.explain import Explained, Explanation, explain, explained
from tightrope.server.fields.logprobs import finite, token_name
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import ERRORS, STATUS_ERRORS
from tightrope.server.http.sse import event_stream
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


async def _events(
    deltas: Deltas, model: str, explanation: Explanation | None, *, wants_probs: bool
) -> AsyncGenerator[bytes, None]:
    prompt: PromptInfo | None = None
    async with aclosing(deltas):
        async for _, delta in deltas:
            prompt = delta.prompt or prompt
            if delta.text or (wants_probs and delta.tokens):
                event: dict[str, Any] = {"index": 0, "content": delta.text, "id_slot": 0, "stop": False}
                if wants_probs:
                    event["completion_probabilities"] = probabilities(delta.tokens)
                yield b"data: %b\n\n" % encode(event)
            if delta.finish is not None:
                assert prompt is not None, "the first delta tells of the prompt"
                ending = _ending("", prompt, checked(delta.finish), model)
                yield b"data: %b\n\n" % encode(ending | explained(explanation, prompt))


def llamacpp_router(front: AppState) -> APIRouter:
    """/completion, /props and /slots."""
    router = APIRouter(route_class=JsonRoute, tags=["llama.cpp"])

    @router.post(
        "/completion",
        response_model=None,
        responses={**ERRORS, 200: {"model": Completion, "description": "The text, whole or as events."}},
    )
    async def completion(body: CompletionBody, request: Request) -> Response:
        """Continue a prompt."""
        served = front.served()
        top = body.n_probs or None
        asked = text_request(
            body,
            body.model_extra or {},
            body.checked_prompt(served),
            served,
            top=top,
        )
        model = model_name(asked, served)
        explanation = await explain(front, [asked.request], asked.ignored, request) if body.explain else None
        if body.stream:
            deltas = await pieces(front, asked, request)
            shown = one_token_each(deltas) if top else deltas
            return event_stream(_events(shown, model, explanation, wants_probs=top is not None), "openai")
        choice = await whole(front, asked, request)
        answer = _ending(choice.text, choice.prompt, choice.finish, model)
        if top:
            answer["completion_probabilities"] = probabilities(choice.tokens)
        answer |= explained(explanation, choice.prompt)
        return Response(encode(answer), media_type="application/json")

    @router.get("/props", responses=STATUS_ERRORS)
    async def props() -> Props:
        """The window and the chat template, from which clients set themselves up."""
        served = front.served()
        info = served.info
        return Props(
            default_generation_settings=Generation(n_ctx=info.max_model_len, model=served.model_id),
            total_slots=info.max_num_seqs,
            model_path=served.model_id,
            chat_template=front.template().source,
            bos_token=info.bos_token or "",
            eos_token=info.eos_token or "",
        )

    @router.get("/slots", responses=STATUS_ERRORS)
    async def slots() -> list[Slot]:
        """How many of the answers that can be written at the same time are being written."""
        info, stats = front.info(), front.client.stats
        return [
            Slot(id=number, n_ctx=info.max_model_len, is_processing=number < stats.num_running)
            for number in range(info.max_num_seqs)
        ]

    return router
