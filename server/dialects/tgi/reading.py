"""From TGI bodies to what is asked, with TGI's checks in TGI's order and words."""

import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from msgspec import structs

from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.types import GenerateRequest, Grammar, LogprobRequest, ModelInfo, Span, TextPrompt
from tightrope.server.asking import Asked, ReadBody, ask
from tightrope.server.dialects.tgi.requests import GenerateBody, Parameters
from tightrope.server.fields.names import Ignored
from tightrope.server.fields.sampling import draws
from tightrope.server.fields.structured import in_tgi_words, read_tgi_grammar
from tightrope.server.served import Served
from tightrope.server.settings.settings import ServerSettings

COUNTED_NEW_TOKENS = 1024  # More tokens asked for than that are not held against the window.


@dataclass(frozen=True, slots=True)
class TGILimits:
    """What /info tells and validation checks."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    adapters: Collection[str] = ()
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0

    @classmethod
    def of(cls, info: ModelInfo, settings: ServerSettings, adapters: Collection[str]) -> "TGILimits":
        longest = info.max_model_len - 1
        return cls(
            max_best_of=settings.engine.limits.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_input_tokens=min(settings.engine.limits.max_input_tokens or longest, longest),
            max_total_tokens=info.max_model_len,
            adapters=adapters,
            watermark_gamma=settings.watermark_gamma,
            watermark_delta=settings.watermark_delta,
        )


def is_sampled(parameters: Parameters | None) -> bool:
    """Whether tokens are drawn. Left-out parameters mean drawing, parameters without do_sample do not.

    As with TGI's own four, a step that only a drawn token can feel means drawing, whichever dialect has its name.
    """
    if parameters is None:
        return True
    p = parameters
    warps = p.temperature not in (None, 1.0) or any(x is not None for x in (p.top_k, p.top_p, p.typical_p))
    return bool(p.do_sample) or warps or draws(p.model_extra or {})


def generate_asked(body: GenerateBody, limits: TGILimits, served: Served, *, is_stream: bool) -> Asked:
    """What the body asks for. Raises InvalidRequest with TGI's first text that applies."""
    p = body.parameters or Parameters()
    sampled = is_sampled(body.parameters)
    best_of = 1 if p.best_of is None else p.best_of
    if is_stream:
        _check_stream(p, best_of)
    _check_ranges(p, best_of, sampled, limits)
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty", "inputs")
    _check_rest(p, limits)
    wants_logprobs = is_stream or p.details or p.decoder_input_details or best_of > 1
    adapter = body.model if p.adapter_id is None and body.model in limits.adapters else p.adapter_id
    read = ReadBody(
        shows_progress=False,  # Clients take every event for a token.
        body=body,
        shared=p,
        given={"include_stop_str_in_output": True} | p.given() | {"do_sample": sampled, "frequency_penalty": None},
        adapter=adapter,
        is_stream=is_stream,
        explain=body.explain,
        n=best_of,
        logprobs=LogprobRequest(processed=True, top=p.top_n_tokens or 0) if wants_logprobs else None,
        prompt_logprobs=0 if p.decoder_input_details else None,
        shape=partial(_grammar, p.grammar),
        ignored=_overruled(body, p, adapter, served),
    )
    asked = ask("tgi", [TextPrompt((Span(body.inputs),))], read, served)
    return replace(asked, requests=[_as_tgi_means(r, p, sampled, limits) for r in asked.requests])


def _as_tgi_means(request: GenerateRequest, p: Parameters, sampled: bool, limits: TGILimits) -> GenerateRequest:
    """The request with what only TGI has, or means otherwise than all others."""
    sampling, stop = request.sampling, request.stop
    is_told = request.logprobs is not None  # The answer names its seed, which must give the text again.
    seed = secrets.randbits(64) if sampling.seed is None and sampled and is_told else sampling.seed
    return structs.replace(
        request,
        sampling=structs.replace(
            sampling,
            seed=seed,
            relative_frequency_penalty=p.frequency_penalty or 0.0,
            watermark_delta=limits.watermark_delta if p.watermark else 0.0,
            watermark_gamma=limits.watermark_gamma,
        ),
        stop=structs.replace(stop, length_first=True),
        truncate_to=request.truncate_to if p.truncate is None else p.truncate,
        reserve_tokens=None if stop.max_tokens is None else min(stop.max_tokens, COUNTED_NEW_TOKENS),
    )


def _grammar(given: dict[str, Any] | None, asked: Grammar | None) -> Grammar | None:
    """The grammar of TGI's own field, or the one that another name asks for."""
    own = read_tgi_grammar(given)
    if own is not None and asked is not None and (own.kind, own.text) != (asked.kind, asked.text):
        raise InvalidRequest(f"{asked.field}: grammar asks for another shape of the answer already", asked.field)
    return own or asked


def _overruled(body: GenerateBody, p: Parameters, adapter: str | None, served: Served) -> list[Ignored]:
    ignored: list[Ignored] = []
    if body.model not in (None, adapter, served.model_id):
        ignored.append(("model", "adapter_id counts" if adapter else "no adapter has this name"))
    if p.truncate is not None and p.truncate_prompt_tokens not in (None, p.truncate):
        ignored.append(("parameters.truncate_prompt_tokens", "truncate came too, and counts"))
    return ignored


def _check_stream(p: Parameters, best_of: int) -> None:
    if best_of != 1:
        raise InvalidRequest("`best_of` != 1 is not supported when streaming tokens", "best_of")
    if p.decoder_input_details:
        raise InvalidRequest(
            "`decoder_input_details` == true is not supported when streaming tokens", "decoder_input_details"
        )


def _check_ranges(p: Parameters, best_of: int, sampled: bool, limits: TGILimits) -> None:
    """The checks before the one for empty inputs, in order."""
    if not 0 < best_of <= limits.max_best_of:
        if limits.max_best_of == 1:
            raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint", "best_of")
        raise InvalidRequest(f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}", "best_of")
    if best_of > 1 and not sampled:
        raise InvalidRequest("you must use sampling when `best_of` is > 1", "best_of")
    _check_positive("temperature", p.temperature)
    _check_positive("repetition_penalty", p.repetition_penalty)
    if p.frequency_penalty is not None and not -2 <= p.frequency_penalty <= 2:
        raise InvalidRequest("`frequency_penalty` must be >= -2.0 and <= 2.0", "frequency_penalty")
    for name, value in (("top_p", p.top_p), ("typical_p", p.typical_p)):
        if value is not None and not 0 < value < 1:
            raise InvalidRequest(f"`{name}` must be > 0.0 and < 1.0", name)
    _check_positive("top_k", p.top_k)
    _check_positive("max_new_tokens", p.max_new_tokens)
    stops = list(filter(None, p.stop or []))
    if len(stops) > limits.max_stop_sequences:
        most = limits.max_stop_sequences
        raise InvalidRequest(f"`stop` supports up to {most} stop sequences. Given: {len(stops)}", "stop")
    if best_of > 1 and p.seed is not None:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1", "seed")
    if p.top_n_tokens is not None and p.top_n_tokens > limits.max_top_n_tokens:
        most = limits.max_top_n_tokens
        raise InvalidRequest(f"`top_n_tokens` must be >= 0 and <= {most}. Given: {p.top_n_tokens}", "top_n_tokens")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise InvalidRequest(f"`{name}` must be strictly positive", name)


def _check_rest(p: Parameters, limits: TGILimits) -> None:
    """The checks after the one for empty inputs; lengths are the engine's to check."""
    if p.truncate is not None and not 0 < p.truncate <= limits.max_input_tokens:
        most = limits.max_input_tokens
        raise InvalidRequest(
            f"`truncate` must be strictly positive and less than {most}. Given: {p.truncate}", "truncate"
        )
    if p.adapter_id is not None and p.adapter_id not in limits.adapters:
        raise InvalidRequest(f"adapter_id: no adapter {p.adapter_id[:100]!r} is loaded", "adapter_id")


def reword(error: InvalidRequest, max_new_tokens: int | None) -> None:
    """Tell the engine's refusal in TGI's words."""
    if not isinstance(error, ContextLengthExceeded):
        error.message = in_tgi_words(error).message
        return
    most, error.param = error.max_model_len, "inputs"
    if error.max_input_tokens:
        error.message = f"`inputs` must have less than {error.max_input_tokens} tokens. Given: {error.prompt_tokens}"
        return
    given = f"at least {error.prompt_tokens}" if error.is_least else f"{error.prompt_tokens}"
    if max_new_tokens is None and error.prompt_tokens <= most:
        error.message = f"`inputs` must have less than {most - 1} tokens. Given: {given}"
    else:
        error.message = (
            f"`inputs` tokens + `max_new_tokens` must be <= {most}. "
            f"Given: {given} `inputs` tokens and {max_new_tokens or 0} `max_new_tokens`"
        )
