"""Every name under which clients send sampling values, and the one line that a new parameter needs here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from tightrope.engine.sampler.steps import NEUTRAL
from tightrope.server.fields.numbers import MAX_INT, Interval, Number, number

Ignored = tuple[str, str]  # It is a field's name, and why it changes nothing.
Bent = tuple[str, str]  # It is a field's name, and for what it was taken.
_MINUS_1 = frozenset({-1})
_CUTOFF = 1e-4  # Clients send epsilon and eta cutoffs in ten-thousandths.
NUMBERS = (
    number("temperature"),
    number("top_k", off=_MINUS_1),
    number("top_p"),
    number("min_p"),
    number("typical_p", "typical_p", "typical", "typ_p"),
    number("repetition_penalty", "repetition_penalty", "rep_pen", "repeat_penalty"),
    number("frequency_penalty", "frequency_penalty", "freq_pen"),
    number("presence_penalty", "presence_penalty", "presence_pen"),
    number(
        "penalty_range",
        *("repetition_penalty_range", "penalty_range", "rep_pen_range", "repeat_last_n", "repetition_range"),
        off=_MINUS_1,
    ),
    number("repetition_decay", "repetition_decay", "token_repetition_decay", part_of="penalty_range"),
    number("smoothing_factor"),
    number("smoothing_curve", part_of="smoothing_factor"),
    number("top_n_sigma", "top_n_sigma", "nsigma", off=_MINUS_1),
    number("tfs", "tfs", "tfs_z"),
    number("top_a"),
    number("epsilon_cutoff", unit=_CUTOFF),
    number("eta_cutoff", unit=_CUTOFF),
    number("xtc_probability"),
    number("xtc_threshold", part_of="xtc_probability"),
    number("mirostat_mode", "mirostat_mode", "mirostat"),
    number("mirostat_tau", part_of="mirostat_mode"),
    number("mirostat_eta", part_of="mirostat_mode"),
    number("skew"),
    number("dry_multiplier"),
    number("dry_base", part_of="dry_multiplier"),
    number("dry_allowed_length", part_of="dry_multiplier"),
    number("dry_range", "dry_range", "dry_penalty_last_n", off=_MINUS_1, part_of="dry_multiplier"),
    number("no_repeat_ngram_size"),
    number("min_keep"),
    number("seed", "seed", "sampler_seed", off=_MINUS_1),
)
MIN_TOKENS = Number("min_tokens", ("min_tokens", "min_length"), Interval(0, MAX_INT, whole=True))
MAX_TOKENS = Number(
    "max_tokens",
    ("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict", "num_predict", "max_length"),
    Interval(0, MAX_INT, whole=True),
    off=frozenset({-1, -2}),  # In llama.cpp's and Ollama's words they mean as many as there is room for.
)
OLLAMA_MAX_TOKENS = "num_predict"  # There 0 is no bound either.
TEMPERATURE = number("temperature")  # It is read for the ends of a dynamic one, too.
DYNATEMP_LOW = ("dynatemp_low", "dynatemp_min", "min_temp")
DYNATEMP_HIGH = ("dynatemp_high", "dynatemp_max", "max_temp")
RANGE = number("dynatemp_range")
EXPONENT = number("dynatemp_exponent", "dynatemp_exponent", "temp_exponent")
ADAPTIVE_TARGET = number("adaptive_target")
ADAPTIVE_DECAY = number("adaptive_decay")
GUIDANCE = Number("scale", ("guidance_scale", "cfg_scale"), Interval(0, 100), off=frozenset({1}))
NEGATIVE = "negative_prompt"

STOPS = ("stop", "stopping_strings", "stop_sequence", "stop_sequences")
IGNORE_EOS = ("ignore_eos", "ban_eos_token", "use_default_badwordsids")  # The last one is KoboldCpp's.
TO_THE_WINDOW = "auto_max_new_tokens"
KEEP_STOP = ("include_stop_str_in_output",)
BANNED_STRINGS = ("banned_strings", "bad_words")
BANNED_TOKENS = ("custom_token_bans", "banned_tokens")
ALLOWED_TOKENS = ("allowed_token_ids", "allowed_tokens")
XTC_IGNORED = "xtc_ignore_tokens"
ORDERS = ("sampler_priority", "samplers", "sampler_order")  # What each means is in sampler_order.py.

NOT_BUILT: Mapping[str, tuple[float, str]] = {  # By name it has the neutral value, and why others are refused.
    "encoder_repetition_penalty": (1, "is not a sampler of this server"),
    "penalty_alpha": (0, "contrastive search is not served"),
    "num_beams": (1, "beam search is not served"),
}
# By name it has what is neutral, and why the rest isn't.
WITHOUT_EFFECT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rep_pen_slope": (lambda v: v in (0, 1), "a penalty is the same all over its range"),
    "length_penalty": (lambda v: v == 1, "beam search is not served"),
    "early_stopping": (lambda v: v is False, "beam search is not served"),
    "max_tokens_second": (lambda v: v == 0, "the rate of tokens is not limited"),
    "speculative_ngram": (lambda v: v is False, "the server decides how it speculates"),
}
OTHER_NUMBERS = (MIN_TOKENS, MAX_TOKENS, RANGE, EXPONENT, ADAPTIVE_TARGET, ADAPTIVE_DECAY, GUIDANCE)
ROPE = frozenset(
    {"rope_scaling", "rope_factor", "rope_theta", "rope_scale", "rope_alpha", "alpha_value", "compress_pos_emb"}
    | {"rope_freq_base", "rope_freq_scale", "rope_frequency_base", "rope_frequency_scale"}
)
GUIDANCE_SCALES = GUIDANCE.names
STEERING: frozenset[str] = frozenset(  # Without these an answer would be another one, and not only drawn otherwise.
    {NEGATIVE, *STOPS, "stop_token_ids", *IGNORE_EOS, "logit_bias"} | {*BANNED_STRINGS, *BANNED_TOKENS, *ALLOWED_TOKENS}
)
KNOWN: frozenset[str] = frozenset(  # All names that are read here are in it.
    {name for number in (*NUMBERS, *OTHER_NUMBERS) for name in number.names}
    | {*STOPS, *IGNORE_EOS, *KEEP_STOP, *BANNED_STRINGS, *BANNED_TOKENS, *ALLOWED_TOKENS}
    | {*DYNATEMP_LOW, *DYNATEMP_HIGH}
    | {"dry_sequence_breakers", "dynamic_temperature", "do_sample", "temperature_last", "stop_token_ids", "logit_bias"}
    | {NEGATIVE, TO_THE_WINDOW, XTC_IGNORED, *ORDERS}
    | NOT_BUILT.keys()
    | WITHOUT_EFFECT.keys()
    | ROPE
)


def api_field(target: str, description: str | None = None) -> Any:  # noqa: ANN401 - as pydantic's Field
    """The field of a body that shows this number on the API page, with its neutral value and its interval."""
    (number,) = (number for number in NUMBERS if number.target == target)
    interval = number.interval
    low, high = min((interval.low, *number.off)), interval.high if math.isfinite(interval.high) else None
    return Field(
        getattr(NEUTRAL, target),
        description=description,
        gt=low if interval.above_low else None,
        ge=None if interval.above_low else low,
        lt=high if interval.below_high else None,
        le=None if interval.below_high else high,
    )
