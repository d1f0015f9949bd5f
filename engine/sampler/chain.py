"""The steps from ranked logits to a drawn token, for a batch whose rows have parameters of their own."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate

import msgspec
import numpy as np
from torch import Tensor

from tightrope.engine.sampler.arrays import Doubles, Ids, Mask
from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.draw import draw, skewed, uniform
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import BY_NAME, NEUTRAL, STEERING, STEPS, function
from tightrope.engine.sampler.transforms import transformed, transforms_of
from tightrope.kernels import dispatch

Run = Callable[Concatenate[Candidates, ...], Candidates]

_RUN: Mapping[str, Run] = {step.name: function(step.run) for step in STEPS if step.run}
_NEUTRAL = msgspec.structs.asdict(NEUTRAL)
# The surprise that steers the next token is of the model's shares, before these give tokens other weights.
_REWEIGHING = frozenset(step.name for step in STEPS if step.stage == STEERING and not step.removes)
_LIST = 128  # A row without top_k lists this many candidates at first: enough for most rows at temperature 1.


@dataclass(frozen=True, slots=True)
class DrawResult:
    """What came of some rows."""

    candidates: Candidates  # They are the kept tokens.
    columns: Ids  # [B]: of the drawn tokens
    settled: Mask  # [B]: False where the list was too short to tell
    drawable: Mask  # [B]: False where nothing can be drawn at all
    surprises: Doubles | None  # [B]: bits, among the tokens given to the step that steers; None without one


class Chain:
    """Rows of logits that have the same order of steps, and the steps that aren't neutral in every row."""

    def __init__(self, logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> None:
        """logits [any, V] float32; rows [B] of them, and their states."""
        self._logits, self._rows = logits, rows
        self._transforms = transforms_of(logits, rows, states)
        self._totals = self._masses(states)
        self._u = _column([_u(state) for state in states])
        self._min_keep = _column([state.params.min_keep for state in states]).astype(np.int64)
        plans = [state.plan for state in states]
        active = {step for plan in plans for step in plan.steps}
        self._steps = [
            (name, [_values(name, column, states) for column in BY_NAME[name].columns])
            for name in plans[0].order
            if name in active
        ]
        self._steers = any(plan.steering is not None for plan in plans)
        self._tops = np.array([[state.processed_top] for state in states])
        self._lists_tops = bool(self._tops.any())
        self._num_listed = np.array([_num_listed(state) for state in states])

    def _masses(self, states: Sequence[SamplerState]) -> Doubles:
        """Weight of each whole row [B, 1], where a step asks for it; elsewhere NaN."""
        totals = np.full((len(states), 1), np.nan)
        if lines := [line for line, state in enumerate(states) if _needs_total(state)]:
            totals[lines] = dispatch.row_mass(self._logits, self._rows[lines], self._transforms[lines])
        return totals

    def run(self, lines: Ids, num_listed: int | None) -> DrawResult:
        """Draw these lines [n] from their `num_listed` largest logits; None: as many as their parameters suggest."""
        wanted = self._num_listed[lines] if num_listed is None else np.full(len(lines), num_listed)
        ranked = dispatch.rank(self._logits, self._rows[lines], wanted)
        transforms = self._transforms[lines]
        with np.errstate(all="ignore"):  # Rows from which nothing can be drawn are full of NaN.
            top = ranked.top.astype(np.float64)
            y, border = transformed(ranked.logits - top, transforms), transformed(ranked.border - top, transforms)
            candidates = Candidates.of_logits(y, ranked.token_ids, border, self._totals[lines], self._min_keep[lines])
            given = candidates
            for name, values in self._steps:
                candidates = _RUN[name](candidates, *(column[lines] for column in values))
                given = given if name in _REWEIGHING else candidates
            columns, settled = draw(candidates, self._u[lines])
            surprises = (
                _surprises(given, np.take_along_axis(candidates.token_ids, columns, 1)) if self._steers else None
            )
        if self._lists_tops:
            settled &= _is_sure_of_tops(candidates, self._tops[lines])
        return DrawResult(candidates, columns[:, 0], settled[:, 0], np.isfinite(ranked.top[:, 0]), surprises)


def _is_sure_of_tops(candidates: Candidates, tops: Ids) -> Mask:
    """Whether the `tops` [B, 1] likeliest tokens, and all that tie with the last of them, are listed: [B, 1]."""
    is_kept = candidates.weights > 0
    last = (candidates.weights * (is_kept & (is_kept.cumsum(1) == tops))).sum(1, keepdims=True)
    is_sure: Mask = candidates.is_complete | (tops == 0) | (last > candidates.border)
    return is_sure


def _surprises(given: Candidates, token_ids: Ids) -> Doubles:
    """Of the drawn tokens [B, 1], in bits [B]."""
    shares = (given.weights * (given.token_ids == token_ids)).sum(1) / given.total[:, 0]
    surprises: Doubles = -np.log2(shares)
    return surprises


def chains(logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> list[tuple[Ids, Chain]]:
    """These rows of a batch, those together that have the same order of steps."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row in rows.tolist():
        groups[states[row].plan.order].append(row)
    return [
        (np.array(group), Chain(logits, np.array(group), [states[row] for row in group])) for group in groups.values()
    ]


def native_params(logits: Tensor, rows: Ids, states: Sequence[SamplerState]) -> Doubles:
    """[B, 5 + 4 * MAX_TRANSFORMS]: u, the truncation parameters and the transforms, as the chain in C++ takes them.

    Greedy is there the one likeliest token. All but u is the same for each token where no transform measures the row.
    """
    known = [state.native_params for state in states if state.native_params is not None]
    if len(known) == len(states):
        found = np.array(known)
        found[:, 0] = [_u(state) for state in states]
        return found
    numbers = []
    for state in states:
        params, steps = state.params, state.plan.steps
        if params.temperature == 0:
            numbers.append([0.0, 1.0, 1.0, 0.0, 1.0])
        elif not steps:
            numbers.append([_u(state), 0.0, 1.0, 0.0, 1.0])
        else:
            numbers.append([_u(state), params.top_k, params.top_p, params.min_p, params.typical_p])
    transforms = transforms_of(logits, rows, states).reshape(len(rows), -1)
    found = np.empty((len(rows), len(numbers[0]) + transforms.shape[1]))
    found[:, : len(numbers[0])], found[:, len(numbers[0]) :] = numbers, transforms
    for state, row in zip(states, found, strict=True):
        state.native_params = None if state.plan.measures else row
    return found


def _u(state: SamplerState) -> float:
    if state.params.temperature == 0:
        return 0.0
    return skewed(uniform(state.seed, state.num_output), state.params.skew)


def _values(step: str, name: str, states: Sequence[SamplerState]) -> Doubles | Ids:
    """A column of a step [B, 1], or token ids [B, any], filled up with -1; neutral where a plan lacks the step."""
    values = [_value(step, name, state) for state in states]
    if not isinstance(values[0], tuple):
        return _column(values)
    token_ids = np.full((len(values), max(map(len, values))), -1, np.int64)
    for line, ids in enumerate(values):
        token_ids[line, : len(ids)] = ids
    return token_ids


def _value(step: str, name: str, state: SamplerState) -> Any:  # noqa: ANN401  # a number, or token ids
    value: Any
    if step in state.plan.steps:
        value = getattr(state.params if name in _NEUTRAL else state, name)
    else:
        value = _NEUTRAL.get(name, 0.0)
    return value


def _column(values: Sequence[float]) -> Doubles:
    return np.array(values, np.float64)[:, None]


def _needs_total(state: SamplerState) -> bool:
    """Whether the weight of the whole vocabulary decides anything, or is part of a logprob."""
    if state.params.temperature == 0:
        return state.wants_processed
    steps = state.plan.steps
    return not steps or BY_NAME[steps[0]].reads_total


def _num_listed(state: SamplerState) -> int:
    params = state.params
    if params.temperature == 0:
        return state.processed_top + 1  # One more shows whether others tie with the last.
    return params.top_k if params.top_k > 0 else max(_LIST, state.processed_top + 1)
