"""Every name under which clients send sampling values, each with the interval that it must lie in."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.steps import LONGEST_RUN
from tightrope.server.fields.sampler_order import Order, kobold_order, llama_cpp_order, named_order

MAX_INT = 2**63 - 1  # what crosses the process border as an integer
_LARGEST = 1e300  # far beyond what any number here is good for

Ignored = tuple[str, str]  # a field's name, and why it changes nothing


def shown(value: object) -> str:
    """A value in a message of one line."""
    text = json.dumps(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= 40 else text[:40] + "..."


@dataclass(frozen=True, slots=True)
class Number:
    """A value of SamplingParams: its names, and the interval that it must lie in."""

    target: str
    names: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False  # the interval is open there
    below_high: bool = False
    whole: bool = False
    off: frozenset[float] = frozenset()  # other values that mean the neutral one
    unit: float = 1.0  # of what clients send, in the engine's unit
    part_of: str | None = None  # means something only while that target isn't neutral, and is read only then

    def read(self, name: str, value: object) -> float:
        """Raises InvalidRequest unless `value` is a number in the interval."""
        wanted = "an integer" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(f"{name} must be {wanted}, not {shown(value)}", name)
        is_low = value < self.low or (self.above_low and value == self.low)
        is_high = value > self.high or (self.below_high and value == self.high)
        if is_low or is_high or not abs(value) <= _LARGEST or (self.whole and value != int(value)):
            raise InvalidRequest(f"{name} must be {wanted} {self._interval()}, not {shown(value)}", name)
        return int(value) if self.whole else value * self.unit

    def _interval(self) -> str:
        low = f"{'above' if self.above_low else 'from'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if self.below_high else 'to'} {self.high:g}" if self.high < math.inf else ""
        return f"{low} {high}".strip() or "of a usual size"


_CUTOFF = 1e-4  # clients send epsilon and eta cutoffs in ten-thousandths

NUMBERS = (
    Number("temperature", ("temperature",), low=0),
    Number("top_k", ("top_k",), low=0, high=MAX_INT, whole=True, off=frozenset({-1})),
    Number("top_p", ("top_p",), low=0, above_low=True, high=1),
    Number("min_p", ("min_p",), low=0, high=1),
    Number("typical_p", ("typical_p", "typical", "typ_p"), low=0, above_low=True, high=1),
    Number("repetition_penalty", ("repetition_penalty", "rep_pen", "repeat_penalty"), low=0, above_low=True),
    Number("frequency_penalty", ("frequency_penalty", "freq_pen"), low=-2, high=2),
    Number("presence_penalty", ("presence_penalty", "presence_pen"), low=-2, high=2),
    Number(
        "penalty_range",
        ("repetition_penalty_range", "penalty_range", "rep_pen_range", "repeat_last_n", "repetition_range"),
        low=0,
        high=MAX_INT,
        whole=True,
        off=frozenset({-1}),
    ),
    Number(
        "repetition_decay",
        ("repetition_decay", "token_repetition_decay"),
        low=0,
        high=MAX_INT,
        whole=True,
        part_of="penalty_range",
    ),
    Number("smoothing_factor", ("smoothing_factor",), low=0, high=1000),
    Number("smoothing_curve", ("smoothing_curve",), low=1, high=100, part_of="smoothing_factor"),
    Number("top_n_sigma", ("top_n_sigma", "nsigma"), low=0, off=frozenset({-1})),
    Number("tfs", ("tfs", "tfs_z"), low=0, above_low=True, high=1),
    Number("top_a", ("top_a",), low=0, high=1),
    Number("epsilon_cutoff", ("epsilon_cutoff",), low=0, high=10_000, below_high=True, unit=_CUTOFF),
    Number("eta_cutoff", ("eta_cutoff",), low=0, high=10_000, below_high=True, unit=_CUTOFF),
    Number("xtc_probability", ("xtc_probability",), low=0, high=1),
    Number("xtc_threshold", ("xtc_threshold",), low=0, high=1, part_of="xtc_probability"),
    Number("mirostat_mode", ("mirostat_mode", "mirostat"), low=0, high=2, whole=True),
    Number("mirostat_tau", ("mirostat_tau",), low=0, above_low=True, part_of="mirostat_mode"),
    Number("mirostat_eta", ("mirostat_eta",), low=0, above_low=True, high=1, part_of="mirostat_mode"),
    Number("skew", ("skew",), low=-20, high=20),
    Number("dry_multiplier", ("dry_multiplier",), low=0),
    Number("dry_base", ("dry_base",), low=1, part_of="dry_multiplier"),
    Number(
        "dry_allowed_length", ("dry_allowed_length",), low=1, high=LONGEST_RUN, whole=True, part_of="dry_multiplier"
    ),
    Number(
        "dry_range",
        ("dry_range", "dry_penalty_last_n"),
        low=0,
        high=MAX_INT,
        whole=True,
        off=frozenset({-1}),
        part_of="dry_multiplier",
    ),
    Number("no_repeat_ngram_size", ("no_repeat_ngram_size",), low=0, high=LONGEST_RUN, whole=True),
    Number("min_keep", ("min_keep",), low=0, high=MAX_INT, whole=True),
    Number("seed", ("seed", "sampler_seed"), low=0, high=2**64, below_high=True, whole=True, off=frozenset({-1})),
)
MIN_TOKENS = Number("min_tokens", ("min_tokens", "min_length"), low=0, high=MAX_INT, whole=True)
MAX_TOKENS = Number(
    "max_tokens",
    ("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict", "num_predict", "max_length"),
    low=0,
    high=MAX_INT,
    whole=True,
    off=frozenset({-1, -2}),  # "as many as there is room for", in llama.cpp's and Ollama's words
)
TEMPERATURE = Number("temperature", (), low=0)
DYNATEMP_LOW = ("dynatemp_low", "dynatemp_min", "min_temp")
DYNATEMP_HIGH = ("dynatemp_high", "dynatemp_max", "max_temp")
RANGE = Number("dynatemp_range", ("dynatemp_range",), low=0)
ADAPTIVE_TARGET = Number("adaptive_target", ("adaptive_target",), high=1)
ADAPTIVE_DECAY = Number("adaptive_decay", ("adaptive_decay",), low=0, high=1, below_high=True)
EXPONENT = Number("dynatemp_exponent", ("dynatemp_exponent", "temp_exponent"), low=0, above_low=True)

GUIDANCE = Number("scale", ("guidance_scale", "cfg_scale"), low=0, high=100, off=frozenset({1}))
NEGATIVE = "negative_prompt"

STOPS = ("stop", "stopping_strings", "stop_sequence", "stop_sequences")
IGNORE_EOS = ("ignore_eos", "ban_eos_token", "use_default_badwordsids")  # the last one is KoboldCpp's
TO_THE_WINDOW = "auto_max_new_tokens"
KEEP_STOP = ("include_stop_str_in_output",)
BANNED_STRINGS = ("banned_strings", "bad_words")
BANNED_TOKENS = ("custom_token_bans", "banned_tokens")
ALLOWED_TOKENS = ("allowed_token_ids", "allowed_tokens")
ORDERS: tuple[tuple[str, Callable[[str, object], Order]], ...] = (
    ("sampler_priority", named_order),
    ("samplers", llama_cpp_order),
    ("sampler_order", kobold_order),
)

NOT_BUILT: Mapping[str, tuple[float, str]] = {  # by name: the neutral value, and why others are refused
    "encoder_repetition_penalty": (1, "is not a sampler of this server"),
    "penalty_alpha": (0, "contrastive search is not served"),
    "num_beams": (1, "beam search is not served"),
}
WITHOUT_EFFECT: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # by name: what is neutral, and why the rest isn't
    "rep_pen_slope": (lambda v: v in (0, 1), "a penalty is the same all over its range"),
    "length_penalty": (lambda v: v == 1, "beam search is not served"),
    "early_stopping": (lambda v: v is False, "beam search is not served"),
    "max_tokens_second": (lambda v: v == 0, "the rate of tokens is not limited"),
    "speculative_ngram": (lambda v: v is False, "the server decides how it speculates"),
}
_OTHER_NUMBERS = (MIN_TOKENS, MAX_TOKENS, RANGE, EXPONENT, ADAPTIVE_TARGET, ADAPTIVE_DECAY, GUIDANCE)
ROPE = frozenset(
    {"rope_scaling", "rope_factor", "rope_theta", "rope_scale", "rope_alpha", "alpha_value", "compress_pos_emb"}
    | {"rope_freq_base", "rope_freq_scale", "rope_frequency_base", "rope_frequency_scale"}
)
GUIDANCE_SCALES = GUIDANCE.names
STEERING: frozenset[str] = frozenset(  # without which an answer would be another one, and not only drawn otherwise
    {NEGATIVE, *STOPS, "stop_token_ids", *IGNORE_EOS, "logit_bias"} | {*BANNED_STRINGS, *BANNED_TOKENS, *ALLOWED_TOKENS}
)
KNOWN: frozenset[str] = frozenset(  # all names that are read here
    {name for number in (*NUMBERS, *_OTHER_NUMBERS) for name in number.names}
    | {*STOPS, *IGNORE_EOS, *KEEP_STOP, *BANNED_STRINGS, *BANNED_TOKENS, *ALLOWED_TOKENS}
    | {*DYNATEMP_LOW, *DYNATEMP_HIGH}
    | {"dry_sequence_breakers", "dynamic_temperature", "do_sample", "temperature_last", "stop_token_ids", "logit_bias"}
    | {NEGATIVE, TO_THE_WINDOW}
    | {name for name, _ in ORDERS}
    | NOT_BUILT.keys()
    | WITHOUT_EFFECT.keys()
    | ROPE
)
