"""The sampler's table: whole, consistent with the code that it names, and shown in docs/sampling.md as it is."""

import numpy as np
import pytest
from checkout import ROOT
from msgspec.structs import fields

from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import BY_NAME, NEUTRAL, STEPS, SamplingParams, Step, function, in_order

pytestmark = pytest.mark.quick

IN_THE_CHAIN = [step for step in STEPS if step.run]


def row(step: Step) -> str:
    """A step as a line of docs/sampling.md."""
    name = step.params[0]
    neutral = {"adaptive_target": "below 0", "seed": "drawn"}.get(name)
    if neutral is None:
        value = getattr(NEUTRAL, name)
        neutral = f"{value:g}" if isinstance(value, int | float) else "none"
    return f"| {step.stage} | `{name}` | {neutral} | {step.meaning} |"


def test_the_page_on_sampling_shows_the_table_row_by_row():
    lines = (ROOT / "docs/sampling.md").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")][2:] == [row(step) for step in STEPS]


def test_every_parameter_but_the_order_itself_belongs_to_a_step():
    read = {name for step in STEPS for name in step.params}
    assert read == {*SamplingParams.__struct_fields__} - {"order"}


def test_the_stages_stand_in_the_order_in_which_they_run():
    assert [step.stage for step in STEPS] == sorted(step.stage for step in STEPS)
    assert in_order(NEUTRAL) == STEPS
    reordered = in_order(SamplingParams(order=("min_p", "temperature")))
    assert [step.name for step in reordered[10:13]] == ["min_p", "temperature", "smoothing"]
    assert {step.name for step in reordered} == {*BY_NAME}


def test_no_step_is_on_at_the_neutral_values():
    assert [step.name for step in STEPS if step.is_on(NEUTRAL)] == []


@pytest.mark.parametrize("step", IN_THE_CHAIN, ids=lambda step: step.name)
def test_a_step_leaves_the_candidates_of_a_row_that_did_not_ask_for_it(step: Step):
    weights = np.array([[0.5, 0.2, 0.15, 0.08, 0.04, 0.02, 0.01]])
    ids, border, none = np.arange(7)[None], np.array([[-np.inf]]), np.array([[0]])
    before = Candidates.of_logits(np.log(weights), ids, border, np.array([[1.0]]), none)
    neutral = {field.name: field.default for field in fields(SamplingParams)}
    with np.errstate(all="ignore"):
        after = function(step.run)(before, *(np.array([[neutral.get(name, 0.0)]]) for name in step.columns))
    assert np.array_equal(after.weights, before.weights)
    assert np.array_equal(after.token_ids, before.token_ids)
    assert after.settled.all()


@pytest.mark.parametrize("step", IN_THE_CHAIN, ids=lambda step: step.name)
def test_what_a_step_reads_is_a_parameter_or_kept_by_the_state(step: Step):
    state = SamplerState(SamplingParams(mirostat_mode=2), [], 5, None)
    assert all(hasattr(state.params, name) != hasattr(state, name) for name in step.columns)
