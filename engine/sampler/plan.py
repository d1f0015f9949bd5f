"""Which steps a sequence's parameters ask for, and in which order: worked out once, as parameters never change."""

from dataclasses import dataclass

from tightrope.engine.sampler.reshaping import LEAST, MOST
from tightrope.engine.types import SAMPLER_ORDER, SamplingParams

_RESHAPING = frozenset({"temperature", "smoothing"})
_ON_ROWS = _RESHAPING | {"top_n_sigma", "eta_cutoff"}  # can be applied to a whole row of logits
STEERING = ("mirostat", "adaptive_p")  # after all others: they look at what was drawn
NATIVE = ("top_k", "top_p", "min_p", "typical_p")  # what the native draw does, in this order


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one sequence that aren't neutral."""

    head: tuple[str, ...]  # applied to the row of logits
    temperature: float  # at which the row is weighed after that; 1 where the temperature is no first step
    steps: tuple[str, ...]  # of candidates
    order: tuple[str, ...]  # of all steps, those that are neutral too
    is_native: bool  # whether the native draw can do all of `steps`

    @property
    def is_steered(self) -> bool:
        """Whether the surprise of the drawn token decides how the next is drawn."""
        return bool(self.steps) and self.steps[-1] in STEERING


def plan(params: SamplingParams) -> Plan:
    """Greedy is the first of all tokens at temperature 1."""
    order = (*params.order, *(step for step in SAMPLER_ORDER if step not in params.order), *STEERING)
    if params.temperature == 0:
        return Plan((), 1.0, (), order, True)
    active = tuple(step for step in order if _is_active(step, params))
    on_rows = _ON_ROWS if params.min_keep <= 1 else _RESHAPING  # nobody counts tokens there
    num_head = next((i for i, step in enumerate(active) if step not in on_rows), len(active))
    head, steps = active[:num_head], active[num_head:]
    temperature = 1.0
    if head == ("temperature",) and params.dynatemp_range == 0:  # costs nothing: weights are exponentials anyway
        head, temperature = (), min(max(params.temperature, LEAST), MOST)
    is_native = params.min_keep <= 1 and steps == tuple(step for step in NATIVE if step in steps)
    return Plan(head, temperature, steps, order, is_native)


def _is_active(step: str, params: SamplingParams) -> bool:
    match step:
        case "temperature":
            return params.temperature != 1 or params.dynatemp_range > 0
        case "smoothing":
            return params.smoothing_factor > 0
        case "top_n_sigma":
            return params.top_n_sigma > 0
        case "top_k":
            return params.top_k > 0
        case "top_p":
            return params.top_p < 1
        case "min_p":
            return params.min_p > 0
        case "typical_p":
            return params.typical_p < 1
        case "tfs":
            return params.tfs < 1
        case "top_a":
            return params.top_a > 0
        case "epsilon_cutoff":
            return params.epsilon_cutoff > 0
        case "eta_cutoff":
            return params.eta_cutoff > 0
        case "xtc":
            return params.xtc_probability > 0
        case "mirostat":
            return params.mirostat_mode > 0
        case "adaptive_p":
            return params.adaptive_target >= 0 and params.mirostat_mode == 0
    raise ValueError(f"there is no step {step!r}")
