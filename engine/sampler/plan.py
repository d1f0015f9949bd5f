"""Which steps a sequence's parameters ask for, and in which order: worked out once, as parameters never change."""

from dataclasses import dataclass

from tightrope.engine.sampler.steps import ORDERED, STEERING, SamplingParams, Step, in_order

NATIVE = ("top_k", "top_p", "min_p", "typical_p")  # The native draw runs these, in this order.


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one sequence that aren't neutral."""

    head: tuple[str, ...]  # The first steps, as long as each can run over the whole row: see transforms.py.
    steps: tuple[str, ...]  # The others run over candidates.
    order: tuple[str, ...]  # All steps of the chain stand here, those that are off too.
    is_native: bool  # The native draw can run all of `steps`.
    steering: Step | None  # Its mu follows what was drawn.
    measures: bool  # A step of the head depends on the whole row.


def plan(params: SamplingParams) -> Plan:
    """Greedy is the first of all tokens, and has no steps. Of the steps that steer, the first that is on runs."""
    chain = [step for step in in_order(params) if step.run]
    order = tuple(step.name for step in chain)
    if params.temperature == 0:
        return Plan((), (), order, True, None, False)
    active = [step for step in chain if step.stage == ORDERED and step.is_on(params)]
    steering = next((step for step in chain if step.stage == STEERING and step.is_on(params)), None)
    if steering is not None:
        active.append(steering)
    num_head = next((i for i, step in enumerate(active) if not _fits_whole_row(step, params)), len(active))
    names = tuple(step.name for step in active)
    head, steps = names[:num_head], names[num_head:]
    keeps_likeliest = "typical_p" not in steps  # Others leave the likeliest token whatever else they remove.
    is_native = params.min_keep <= keeps_likeliest and steps == tuple(s for s in NATIVE if s in steps)
    is_native = is_native and steering is None
    rows = (step.whole_row for step in active[:num_head])
    measures = any(row is not None and row.measures(params) for row in rows)
    return Plan(head, steps, order, is_native, steering, measures)


def _fits_whole_row(step: Step, params: SamplingParams) -> bool:
    """A whole row's tokens aren't counted, so nothing can be kept there for their number's sake."""
    counts = step.removes and params.min_keep > 1
    return step.whole_row is not None and step.whole_row.fits(params) and not counts
