"""Answers of the TGI routes: objects, events and headers."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from tightrope.engine.errors import BackendFailed
from tightrope.engine.types import Finish, GenerateRequest, PromptInfo, Token
from tightrope.server.answering import Choice
from tightrope.server.deltas.side_by_side import Deltas
from tightrope.server.fields.explain import Explanation, explained

encode = msgspec.json.Encoder().encode

FINISH_REASONS: Mapping[str, str] = {
    "length": "length",
    "eos": "eos_token",
    "stop_token": "eos_token",
    "stop_string": "stop_sequence",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What of an answer the client wants to see."""

    request: GenerateRequest
    details: bool
    full_text: str  # to be put in front: the inputs, or nothing
    is_sampled: bool
    explanation: Explanation | None = None

    @property
    def top(self) -> int:
        return self.request.logprobs.top if self.request.logprobs is not None else 0

    def seed(self, prompt: PromptInfo) -> int | None:
        return prompt.seed if self.is_sampled else None


def reason(finish: Finish) -> str:
    """TGI's word for an end. Raises BackendFailed for an error: TGI has no word for one."""
    if finish.reason == "error":
        raise BackendFailed(finish.message or "the model failed")
    return FINISH_REASONS[finish.reason]


def token_json(token: Token) -> dict[str, Any]:
    """A generated token; a special one shows its own text, though that is not in the answer's."""
    text = token.raw.decode("utf-8", "replace") if token.is_special else token.text
    return {"id": token.token_id, "text": text, "logprob": token.logprob, "special": token.is_special}


def top_json(token: Token) -> list[dict[str, Any]]:
    """The likeliest tokens at a token's place."""
    return [
        {
            "id": top.token_id,
            "text": top.raw.decode("utf-8", "replace"),
            "logprob": top.logprob,
            "special": top.is_special,
        }
        for top in token.top
    ]


def _sequence(choice: Choice, asked: Asked) -> dict[str, Any]:
    """What `details` and `best_of_sequences` have in common."""
    prefill = [
        {"id": token.token_id, "text": token.raw.decode("utf-8", "replace"), "logprob": token.logprob}
        for token in choice.prompt.tokens or ()
    ]
    return {
        "finish_reason": reason(choice.finish),
        "generated_tokens": choice.finish.num_tokens,
        "seed": asked.seed(choice.prompt),
        "prefill": prefill,
        "tokens": [token_json(token) for token in choice.tokens],
    }


def answer_json(choices: Sequence[Choice], asked: Asked) -> dict[str, Any]:
    """The whole answer: the likeliest of `choices`, which come best first. Raises BackendFailed."""
    best, others = choices[0], choices[1:]
    reason(best.finish)
    answer: dict[str, Any] = {"generated_text": asked.full_text + best.text}
    told = explained(asked.explanation, best.prompt)
    if not asked.details:
        return answer | told
    details = _sequence(best, asked)
    if others:
        details["best_of_sequences"] = [
            {"generated_text": asked.full_text + other.text, **_sequence(other, asked), **_top_tokens(other, asked)}
            for other in others
        ]
    answer["details"] = details | _top_tokens(best, asked)
    return answer | told


def _top_tokens(choice: Choice, asked: Asked) -> dict[str, Any]:
    return {"top_tokens": [top_json(token) for token in choice.tokens]} if asked.top else {}


async def answer_events(deltas: Deltas, asked: Asked) -> AsyncGenerator[bytes, None]:
    """One event per token; the last one has the whole text. Raises BackendFailed."""
    texts = [asked.full_text]
    prompt: PromptInfo | None = None
    index = 0
    async with aclosing(deltas):
        async for _, delta in deltas:
            prompt = delta.prompt or prompt
            texts.append(delta.text)
            finish = delta.finish
            ended = reason(finish) if finish is not None else None
            events = b""
            for position, token in enumerate(delta.tokens):
                index += 1
                event: dict[str, Any] = {"index": index, "token": token_json(token)}
                if asked.top:
                    event["top_tokens"] = top_json(token)
                event["generated_text"] = event["details"] = None
                if finish is not None and position == len(delta.tokens) - 1:
                    event["generated_text"] = "".join(texts)
                    if asked.details:
                        assert prompt is not None, "the first delta tells of the prompt"
                        event["details"] = {
                            "finish_reason": ended,
                            "generated_tokens": finish.num_tokens,
                            "seed": asked.seed(prompt),
                            "input_length": prompt.num_tokens,
                        }
                    event |= explained(asked.explanation, prompt)
                events += b"data: " + encode(event) + b"\n\n"
            if events:
                yield events


def stream_headers(inputs: str, compute_type: str) -> dict[str, str]:
    """Headers that are known before the answer."""
    return {"x-compute-type": compute_type, "x-compute-characters": str(len(inputs))}


def answer_headers(inputs: str, compute_type: str, choice: Choice, arrived_s: float) -> dict[str, str]:
    """Headers of a whole answer; whole milliseconds, but compute time in seconds. `arrived_s` by time.monotonic()."""
    total_s = time.monotonic() - arrived_s
    timings = choice.finish.timings
    inference_s = timings.prefill_s + timings.decode_s
    validation_s = max(0.0, total_s - timings.queue_s - inference_s)
    num_tokens = choice.finish.num_tokens
    milliseconds = {
        "x-total-time": total_s,
        "x-validation-time": validation_s,
        "x-queue-time": timings.queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / max(1, num_tokens),
    }
    return {
        **stream_headers(inputs, compute_type),
        "x-compute-time": f"{total_s:.6f}",
        **{name: str(int(seconds * 1000)) for name, seconds in milliseconds.items()},
        "x-prompt-tokens": str(choice.prompt.num_tokens),
        "x-generated-tokens": str(num_tokens),
    }
