"""Which steps a sequence's parameters ask for, and in which order: worked out once, as parameters never change."""

from dataclasses import dataclass

from tightrope.engine.types import SAMPLER_ORDER, SamplingParams

_RESHAPING = frozenset({"temperature", "smoothing"})
_BY_SIZE_ALONE = _RESHAPING | {"top_n_sigma", "eta_cutoff", "mirostat"}  # look at nothing but a logit and sums over all
_STEEPEST = 3  # curve of smoothing that keeps the order of logits
STEERING = ("mirostat", "adaptive_p")  # after all others: they look at what was drawn
NATIVE = ("top_k", "top_p", "min_p", "typical_p")  # what the native draw does, in this order


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one sequence that aren't neutral."""

    head: tuple[str, ...]  # the first of them, as long as they keep the order of logits and need no list: transforms.py
    steps: tuple[str, ...]  # the others: of candidates
    order: tuple[str, ...]  # of all steps, those that are neutral too
    is_native: bool  # whether the native draw can do all of `steps`

    @property
    def is_steered(self) -> bool:
        """Whether the surprise of the drawn token decides how the next is drawn."""
        return not {*self.head, *self.steps}.isdisjoint(STEERING)


def plan(params: SamplingParams) -> Plan:
    """Greedy is the first of all tokens, and has no steps."""
    order = (*params.order, *(step for step in SAMPLER_ORDER if step not in params.order), *STEERING)
    if params.temperature == 0:
        return Plan((), (), order, True)
    active = tuple(step for step in order if _is_active(step, params))
    by_size_alone = _BY_SIZE_ALONE if params.min_keep <= 1 else _RESHAPING  # nobody counts tokens there
    if params.smoothing_curve > _STEEPEST:
        by_size_alone -= {"smoothing"}
    if params.mirostat_mode == 1:
        by_size_alone -= {"mirostat"}
    num_head = next((i for i, step in enumerate(active) if step not in by_size_alone), len(active))
    head, steps = active[:num_head], active[num_head:]
    is_native = params.min_keep <= 1 and "mirostat" not in head and steps == tuple(s for s in NATIVE if s in steps)
    return Plan(head, steps, order, is_native)


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
