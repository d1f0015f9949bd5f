"""The sampler's one table: what a request may ask for, its neutral values and ranges, and the steps that read it.

Plan, chain, `explain`, the front's checks and docs/sampling.md come from here. A new step is a row of STEPS with its
parameters in SamplingParams, its function, and a line of names in server/fields/names.py. The front imports this
module, so functions are named here and looked up by `function` where the engine runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any

from msgspec import Meta, Struct, field

LONGEST_RUN = 256  # DRY and no_repeat_ngram_size take any longer repetition for one of this many tokens.
MAX_DELTA = 100.0  # A higher one draws of the likelier half alone, too.

Probability = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Cutoff = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Additive = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0)]


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. Defaults are neutral; the STEPS that read a parameter say what it means."""

    temperature: NotNegative = 1.0
    top_k: Count = 0
    top_p: Probability = 1.0
    min_p: Probability = 0.0
    typical_p: Probability = 1.0
    repetition_penalty: Positive = 1.0
    frequency_penalty: Additive = 0.0
    presence_penalty: Additive = 0.0
    relative_frequency_penalty: Additive = 0.0
    penalty_range: Count = 0
    repetition_decay: Count = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None  # It is below 2**64, a bound that msgspec cannot hold.
    dynatemp_range: NotNegative = 0.0
    dynatemp_exponent: Positive = 1.0
    smoothing_factor: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    smoothing_curve: Annotated[float, Meta(ge=1, le=100)] = 1.0
    top_n_sigma: NotNegative = 0.0
    tfs: Probability = 1.0
    top_a: Probability = 0.0
    epsilon_cutoff: Cutoff = 0.0
    eta_cutoff: Cutoff = 0.0
    xtc_probability: Probability = 0.0
    xtc_threshold: Probability = 0.1
    xtc_ignore_tokens: tuple[int, ...] = ()
    xtc_spares_ends: bool = False  # The model's end tokens are among those that it ignores, too.
    mirostat_mode: Annotated[int, Meta(ge=0, le=2)] = 0
    mirostat_tau: Positive = 5.0
    mirostat_eta: Share = 0.1
    adaptive_target: Annotated[float, Meta(le=1)] = -1.0
    adaptive_decay: Cutoff = 0.9
    skew: Annotated[float, Meta(ge=-20, le=20)] = 0.0
    dry_multiplier: NotNegative = 0.0
    dry_base: Annotated[float, Meta(ge=1)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=1, le=LONGEST_RUN)] = 2
    dry_range: Count = 0
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, le=LONGEST_RUN)] = 0
    min_keep: Count = 0
    watermark_delta: Annotated[float, Meta(ge=0, le=MAX_DELTA)] = 0.0
    watermark_gamma: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    banned_tokens: tuple[int, ...] = ()
    banned_strings: tuple[str, ...] = ()
    order: tuple[str, ...] = ()  # It holds names of SAMPLER_ORDER; those left out follow as they stand there.


NEUTRAL = SamplingParams()
BIAS, ORDERED, STEERING, DRAW = 4, 5, 6, 7  # Stages run in this order; 0 is the watermark, 1 to 3 the penalties.


def _always(_: SamplingParams) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class WholeRow:
    """How a step that keeps the order of logits runs over a whole row, in one pass, before any list of candidates.

    `run` names a function (SamplerState, sums of the row) -> Transform; it needs the sums where `measures` says so, and
    can do the step where it `fits`.
    """

    run: str
    fits: Callable[[SamplingParams], bool] = _always
    measures: Callable[[SamplingParams], bool] = _always


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the table. Functions are named `module.function`, in this package.

    A step is on while the first of its `params` isn't neutral, or when `runs_if` says so. One of the chain has a `run`:
    (Candidates, a column [B, 1] for each name in `reads`) -> Candidates.
    """

    name: str
    stage: int
    params: tuple[str, ...]
    meaning: str  # It is Markdown.
    run: str = ""
    reads: tuple[str, ...] = ()  # Of SamplingParams or SamplerState; all `params` where nothing is said.
    removes: bool = True  # A step that removes nothing gives tokens other weights.
    reads_total: bool = False  # The weight of the whole vocabulary must be known.
    whole_row: WholeRow | None = None
    steer: tuple[str, str] = ("", "")  # (params) -> first mu, and (mu, bits of surprise, params) -> next mu
    runs_if: Callable[[SamplingParams], bool] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What `run` takes, one number for each row, or token ids."""
        return self.reads or self.params

    def is_on(self, params: SamplingParams) -> bool:
        if self.runs_if is not None:
            return self.runs_if(params)
        on: bool = getattr(params, self.params[0]) != getattr(NEUTRAL, self.params[0])
        return on


def _truncation(name: str, meaning: str, reads_total: bool = False, whole_row: WholeRow | None = None) -> Step:
    """A step of one parameter, with a function of its name."""
    run = f"truncation.{name}"
    return Step(name, ORDERED, (name,), meaning, run, reads_total=reads_total, whole_row=whole_row)


STEPS = (
    Step(
        "watermark",
        0,
        ("watermark_delta", "watermark_gamma"),
        "Added to the logits of a share of the vocabulary, `watermark_gamma`, which each token chooses for the next "
        "one. TGI's `watermark`; both are the server's settings.",
    ),
    Step(
        "repetition_penalty",
        1,
        ("repetition_penalty", "penalty_range", "repetition_decay"),
        "A token that occurs in prompt or output: a positive logit is divided by the penalty, a negative one "
        "multiplied; once, however often the token occurs.",
    ),
    Step(
        "frequency_penalty",
        2,
        ("frequency_penalty", "penalty_range"),
        "Subtracted as many times as the token occurs in the output.",
    ),
    Step("presence_penalty", 2, ("presence_penalty", "penalty_range"), "Subtracted if the token occurs in the output."),
    Step(
        "relative_frequency_penalty",
        3,
        ("relative_frequency_penalty", "penalty_range"),
        "Times the token's share of prompt and output, subtracted. TGI's `frequency_penalty`.",
    ),
    Step("logit_bias", BIAS, ("logit_bias",), "Added. −100 bans and 100 forces a token, as far as logits go."),
    Step("banned_tokens", BIAS, ("banned_tokens",), "A logit of −inf, whatever else is added."),
    Step(
        "dry",
        BIAS,
        ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_range", "dry_sequence_breakers"),
        "DRY: a token that would go on with a stretch of `dry_allowed_length` or more tokens which stands in prompt "
        "and output already loses `dry_multiplier` · `dry_base`^(length − `dry_allowed_length`). No stretch reaches "
        "across a text of `dry_sequence_breakers`; `dry_range` looks at the last n tokens. A stretch counts up to "
        f"{LONGEST_RUN} tokens.",
    ),
    Step(
        "no_repeat_ngram",
        BIAS,
        ("no_repeat_ngram_size",),
        "Bans the token that would complete n tokens which are there already.",
    ),
    Step("banned_strings", BIAS, ("banned_strings",), "Texts that the answer never holds: see below."),
    Step(
        "temperature",
        ORDERED,
        ("temperature", "dynatemp_range", "dynatemp_exponent"),
        "Divides. 0 is greedy: the largest logit, of equals the lowest id, and no other step runs. Held between 1e-30 "
        "and 1e30. `dynatemp_range` lets it move that far up and down, to the share that the entropy has of its "
        "largest possible value, to the power of `dynatemp_exponent`.",
        run="reshaping.temperature",
        removes=False,
        whole_row=WholeRow("whole_rows.temperature", measures=lambda params: params.dynatemp_range > 0),
        runs_if=lambda params: params.temperature != 1 or params.dynatemp_range > 0,
    ),
    Step(
        "smoothing",
        ORDERED,
        ("smoothing_factor", "smoothing_curve"),
        "Reshapes the logits x below the largest: factor · x² · (x · (curve − 1) / 2 − (3 − curve) / 2), with "
        "`smoothing_curve`.",
        run="reshaping.smoothing",
        removes=False,
        whole_row=WholeRow(  # A steeper curve changes the order of logits.
            "whole_rows.smoothing", fits=lambda params: params.smoothing_curve <= 3, measures=lambda _: False
        ),
    ),
    _truncation(
        "top_n_sigma",
        "Logits at most n standard deviations of all below the largest.",
        whole_row=WholeRow("whole_rows.top_n_sigma"),
    ),
    _truncation("top_k", "The k likeliest tokens; of equals the lowest ids, so it is exactly k."),
    _truncation(
        "top_p",
        "The smallest set of likeliest tokens whose share of what is left reaches p; at least one.",
        reads_total=True,
    ),
    _truncation("min_p", "Tokens at least p times as likely as the likeliest."),
    _truncation(
        "typical_p", "The smallest set that reaches p of tokens whose surprisal is nearest the entropy; at least one."
    ),
    _truncation("tfs", "The likeliest tokens, up to where the curve of sorted probabilities has become straight."),
    _truncation("top_a", "Tokens of at least a times the square of the largest probability.", reads_total=True),
    _truncation(
        "epsilon_cutoff", "Tokens of at least this probability; clients send it in ten-thousandths.", reads_total=True
    ),
    _truncation(
        "eta_cutoff",
        "Tokens of at least min(η, √η · exp(−entropy)); clients send it in ten-thousandths.",
        whole_row=WholeRow("whole_rows.eta_cutoff"),
    ),
    Step(
        "xtc",
        ORDERED,
        ("xtc_probability", "xtc_threshold", "xtc_ignore_tokens", "xtc_spares_ends"),
        "With this probability, of the tokens of at least `xtc_threshold` all but the least likely are removed. Those "
        "of `xtc_ignore_tokens` neither count nor go, with `xtc_spares_ends` the model's end tokens as well. The dice "
        "have a stream of their own under the seed.",
        run="truncation.xtc",
        reads=("xtc_acts", "xtc_threshold", "xtc_ignore_tokens"),
        reads_total=True,
    ),
    Step(
        "min_keep",
        ORDERED,
        ("min_keep",),
        "Each step that removes tokens leaves at least this many, the likeliest of those that it was given.",
    ),
    Step(
        "mirostat",
        STEERING,
        ("mirostat_mode", "mirostat_tau", "mirostat_eta"),
        "Tokens of at most mu bits of surprise (2), or as many as Zipf's law expects to (1); mu starts at twice "
        "`mirostat_tau` and is corrected by `mirostat_eta` times what was missed.",
        run="mirostat.mirostat",
        reads=("mirostat_mode", "mu", "vocab_size"),
        reads_total=True,
        whole_row=WholeRow("whole_rows.mirostat_2", fits=lambda params: params.mirostat_mode == 2),
        steer=("mirostat.first_mu", "mirostat.next_mu"),
    ),
    Step(
        "adaptive_p",
        STEERING,
        ("adaptive_target", "adaptive_decay"),
        "Adaptive-p: tokens of about this probability are preferred: weights exp(−10 · d² / (1 + d)) with "
        "d = abs(p − current) / 0.3. The current target starts at the target; after a token of probability p it is "
        "`adaptive_decay` · current + (1 − `adaptive_decay`) · (2 · target − p), held between 0 and 1. Everything "
        "that is left is possible: use it after `min_p`. Mirostat goes before it where both are asked for.",
        run="adaptive.adaptive_p",
        reads=("adaptive_target", "mu"),
        removes=False,
        reads_total=True,
        steer=("adaptive.first_target", "adaptive.next_target"),
        runs_if=lambda params: params.adaptive_target >= 0,
    ),
    Step(
        "skew",
        DRAW,
        ("skew",),
        "The number of the draw, u, becomes u^exp(−skew): above 0 it falls on less likely tokens, below 0 on likelier "
        "ones.",
    ),
    Step("seed", DRAW, ("seed",), "One uniform number picks a token by its share."),
)
BY_NAME = {step.name: step for step in STEPS}
# The order in which the steps of its stage run unless a request names another.
SAMPLER_ORDER = tuple(step.name for step in STEPS if step.stage == ORDERED and step.run)
_BEFORE = tuple(step for step in STEPS if step.stage < ORDERED)
_AFTER = tuple(step for step in STEPS if step.stage >= ORDERED and step.name not in SAMPLER_ORDER)


def in_order(params: SamplingParams) -> tuple[Step, ...]:
    """All steps, those that are off too, in the order in which they run for this request."""
    names = (*params.order, *(name for name in SAMPLER_ORDER if name not in params.order))
    return (*_BEFORE, *(BY_NAME[name] for name in names), *_AFTER)


@cache
def function(name: str) -> Callable[..., Any]:  # Each kind of function has the signature that its field tells.
    """The function that a row names."""
    module, _, attribute = name.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(f"tightrope.engine.sampler.{module}"), attribute)
    return found
