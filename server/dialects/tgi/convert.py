"""From TGI bodies to engine requests, with TGI's checks in TGI's order and words."""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from uuid import uuid4

from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import GenerateRequest, LogprobRequest, ModelInfo, Span, StopRules, TextPrompt
from tightrope.server.dialects.tgi.requests import Parameters
from tightrope.server.fields.structured import in_tgi_words, read_tgi_grammar
from tightrope.server.settings.settings import ServerSettings

COUNTED_NEW_TOKENS = 1024  # more tokens asked for than that are not held against the window


@dataclass(frozen=True, slots=True)
class TGILimits:
    """What /info tells and validation checks."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    adapters: Collection[str] = ()

    @classmethod
    def of(cls, info: ModelInfo, settings: ServerSettings, adapters: Collection[str]) -> "TGILimits":
        return cls(
            max_best_of=settings.engine.limits.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_input_tokens=info.max_model_len - 1,
            max_total_tokens=info.max_model_len,
            adapters=adapters,
        )


def is_sampled(parameters: Parameters | None) -> bool:
    """Whether tokens are drawn. Left-out parameters mean drawing, parameters without do_sample do not."""
    if parameters is None:
        return True
    p = parameters
    warps = p.temperature not in (None, 1.0) or any(x is not None for x in (p.top_k, p.top_p, p.typical_p))
    return bool(p.do_sample) or warps


def generate_request(
    inputs: str, parameters: Parameters | None, limits: TGILimits, *, is_stream: bool, model: str | None = None
) -> GenerateRequest:
    """The engine's request; `model` may name an adapter. Raises InvalidRequest with TGI's first text that applies."""
    p = parameters or Parameters()
    sampled = is_sampled(parameters)
    best_of = 1 if p.best_of is None else p.best_of
    if is_stream:
        _check_stream(p, best_of)
    _check_ranges(p, best_of, sampled, limits)
    if not inputs:
        raise InvalidRequest("`inputs` cannot be empty", "inputs")
    _check_rest(p, limits)
    top = p.top_n_tokens or 0
    wants_details = p.details or p.decoder_input_details
    wants_logprobs = is_stream or wants_details or best_of > 1
    return GenerateRequest(
        request_id=f"tgi-{uuid4().hex}",
        prompt=TextPrompt((Span(inputs),)),
        sampling=_sampling(p, sampled, is_told=wants_logprobs),
        stop=StopRules(
            max_tokens=p.max_new_tokens, strings=tuple(p.stop or ()), keep_stop_text=True, length_first=True
        ),
        grammar=read_tgi_grammar(p.grammar),
        n=best_of,
        logprobs=LogprobRequest(processed=True, top=top) if wants_logprobs else None,
        prompt_logprobs=0 if p.decoder_input_details else None,
        truncate_to=p.truncate,
        adapter=model if p.adapter_id is None and model in limits.adapters else p.adapter_id,
        adapter_scale=p.adapter_scale,
        reserve_tokens=None if p.max_new_tokens is None else min(p.max_new_tokens, COUNTED_NEW_TOKENS),
    )


def _sampling(p: Parameters, sampled: bool, *, is_told: bool) -> SamplingParams:
    """is_told: the answer names its seed, which must give the text again."""
    seed = secrets.randbits(64) if p.seed is None and sampled and is_told else p.seed
    return SamplingParams(
        temperature=(1.0 if p.temperature is None else p.temperature) if sampled else 0.0,
        top_k=p.top_k or 0,
        top_p=1.0 if p.top_p is None else p.top_p,
        typical_p=1.0 if p.typical_p is None else p.typical_p,
        repetition_penalty=1.0 if p.repetition_penalty is None else p.repetition_penalty,
        relative_frequency_penalty=p.frequency_penalty or 0.0,
        seed=seed,
    )


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
    stops = p.stop or []
    if len(stops) > limits.max_stop_sequences:
        most = limits.max_stop_sequences
        raise InvalidRequest(f"`stop` supports up to {most} stop sequences. Given: {len(stops)}", "stop")
    if "" in stops:
        raise InvalidRequest("`stop` sequences cannot be empty", "stop")
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
    if p.watermark:
        raise InvalidRequest("`watermark` is not supported: this server doesn't mark its texts", "watermark")
    if p.adapter_id is not None and p.adapter_id not in limits.adapters:
        raise InvalidRequest(f"adapter_id: no adapter {p.adapter_id[:100]!r} is loaded", "adapter_id")


def refusal(exc: InvalidRequest, max_new_tokens: int | None) -> InvalidRequest:
    """The engine's refusal in TGI's words."""
    if not isinstance(exc, ContextLengthExceeded):
        return in_tgi_words(exc)
    most = exc.max_model_len
    given = f"at least {exc.prompt_tokens}" if exc.is_least else f"{exc.prompt_tokens}"
    if max_new_tokens is None and exc.prompt_tokens <= most:
        return InvalidRequest(f"`inputs` must have less than {most - 1} tokens. Given: {given}", "inputs")
    return InvalidRequest(
        f"`inputs` tokens + `max_new_tokens` must be <= {most}. "
        f"Given: {given} `inputs` tokens and {max_new_tokens or 0} `max_new_tokens`",
        "inputs",
    )
