"""TGI as a dialect: answers as objects, events and headers."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import msgspec
from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Delta, PromptInfo, Token
from tightrope.server.answering import Dialect, Ending, checked
from tightrope.server.asking import Asked
from tightrope.server.deltas.choices import Choice
from tightrope.server.deltas.prompt_ids import prompt_ids
from tightrope.server.dialects.tgi.reading import TGILimits, generate_asked, reword
from tightrope.server.dialects.tgi.requests import CompatBody, GenerateBody
from tightrope.server.http.errors import Column
from tightrope.server.http.hangup import or_gone
from tightrope.server.state import AppState

G = TypeVar("G", bound=GenerateBody)

encode = msgspec.json.Encoder().encode

FINISH_REASONS: Mapping[str, str] = {
    "length": "length",
    "eos": "eos_token",
    "stop_token": "eos_token",
    "stop_string": "stop_sequence",
}


def compute_type(front: AppState) -> str:
    """TGI's word for where the model runs."""
    return "gpu" if front.settings.engine.model.gpu_layers else "cpu"


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


class _TGI(Dialect[G]):
    """An answer, of which the last event has the whole text."""

    column: ClassVar[Column] = "tgi"
    refuses_by_events: ClassVar[bool] = True

    # It decides whether the inputs come in front of the answer where nothing else is said.
    is_full: ClassVar[bool] = False

    def __init__(self, asked: Asked, body: GenerateBody, compute: str) -> None:
        super().__init__(asked)
        p = body.parameters
        is_full = self.is_full if p is None or p.return_full_text is None else p.return_full_text
        logprobs = asked.requests[0].logprobs
        self._details = p is not None and (p.details or p.decoder_input_details)
        self._is_sampled = asked.requests[0].sampling.temperature > 0
        self._has_top = logprobs is not None and logprobs.top > 0
        self._full_text = body.inputs if is_full else ""  # It is put in front.
        self._texts = [self._full_text]
        self._num_events = 0
        self._shows_ids = p is not None and p.return_token_ids
        self._prompt_ids: Sequence[int] = ()  # They are here where they are asked for.
        self._arrived_s = time.monotonic()
        self._first_headers = {"x-compute-type": compute, "x-compute-characters": str(len(body.inputs))}

    @classmethod
    async def read(cls, front: AppState, body: G, request: Request) -> Self:
        served = front.served()
        limits = TGILimits.of(served.info, front.settings, served.adapters)
        is_stream = body.stream if isinstance(body, CompatBody) else cls.is_stream
        spoken = cls(generate_asked(body, limits, served, is_stream=is_stream), body, compute_type(front))
        if spoken._shows_ids:
            (spoken._prompt_ids,) = await or_gone(request, prompt_ids(front, spoken.asked.requests))
        return spoken

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        self._texts.append(delta.text)
        if delta.finish is not None:
            checked(delta.finish)
        events = b""
        for position, token in enumerate(delta.tokens, 1):
            self._num_events += 1
            event: dict[str, Any] = {"index": self._num_events, "token": token_json(token)}
            if self._has_top:
                event["top_tokens"] = top_json(token)
            if self._shows_ids and self._num_events == 1:
                event["prompt_token_ids"] = self._prompt_ids
            event["generated_text"] = event["details"] = None
            if ending is not None and delta.finish is not None and position == len(delta.tokens):
                event["generated_text"] = "".join(self._texts)
                if self._details:
                    event["details"] = {
                        "finish_reason": FINISH_REASONS[delta.finish.reason],
                        "generated_tokens": delta.finish.num_tokens,
                        "seed": self._seed(ending.prompts[0]),
                        "input_length": ending.prompts[0].num_tokens,
                    }
                event |= ending.explained
            events += b"data: " + encode(event) + b"\n\n"
        return events

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        best, *others = sorted(choices, key=Choice.mean_logprob, reverse=True)
        checked(best.finish)
        answer: dict[str, Any] = {"generated_text": self._full_text + best.text}
        if self._details:
            details = self._sequence(best)
            if others:
                details["best_of_sequences"] = [
                    {"generated_text": self._full_text + other.text, **self._sequence(other), **self._top(other)}
                    for other in others
                ]
            answer["details"] = details | self._top(best)
        if self._shows_ids:
            answer |= {
                "prompt_token_ids": self._prompt_ids,
                "token_ids": [token.token_id for token in best.tokens],
            }
        return answer | ending.explained

    def _sequence(self, choice: Choice) -> dict[str, Any]:
        """What `details` and `best_of_sequences` have in common."""
        prefill = [
            {"id": token.token_id, "text": token.raw.decode("utf-8", "replace"), "logprob": token.logprob}
            for token in choice.prompt.tokens or ()
        ]
        return {
            "finish_reason": FINISH_REASONS[checked(choice.finish).reason],
            "generated_tokens": choice.finish.num_tokens,
            "seed": self._seed(choice.prompt),
            "prefill": prefill,
            "tokens": [token_json(token) for token in choice.tokens],
        }

    def _top(self, choice: Choice) -> dict[str, Any]:
        return {"top_tokens": [top_json(token) for token in choice.tokens]} if self._has_top else {}

    def _seed(self, prompt: PromptInfo) -> int | None:
        return prompt.seed if self._is_sampled else None

    def headers(self, choices: Sequence[Choice]) -> Mapping[str, str]:
        """Times in whole milliseconds, but compute time in seconds."""
        if not choices:
            return self._first_headers
        choice = max(choices, key=Choice.mean_logprob)
        total_s = time.monotonic() - self._arrived_s
        timings = choice.finish.timings
        inference_s = timings.prefill_s + timings.decode_s
        num_tokens = choice.finish.num_tokens
        milliseconds = {
            "x-total-time": total_s,
            "x-validation-time": max(0.0, total_s - timings.queue_s - inference_s),
            "x-queue-time": timings.queue_s,
            "x-inference-time": inference_s,
            "x-time-per-token": inference_s / max(1, num_tokens),
        }
        return {
            **self._first_headers,
            "x-compute-time": f"{total_s:.6f}",
            **{name: str(int(seconds * 1000)) for name, seconds in milliseconds.items()},
            "x-prompt-tokens": str(choice.prompt.num_tokens),
            "x-generated-tokens": str(num_tokens),
        }

    def reword(self, error: InvalidRequest) -> None:
        reword(error, self.asked.requests[0].stop.max_tokens)


class Generate(_TGI[GenerateBody]):
    """POST /generate."""


class GenerateStream(_TGI[GenerateBody]):
    """POST /generate_stream."""

    is_stream = True


class Compat(_TGI[CompatBody]):
    """POST /: a list of one answer, or events."""

    is_full = True

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        return [super().whole(choices, ending)]
