"""Draw the next token of every sequence of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tightrope.engine.guided.grammar import masks
from tightrope.engine.sampler import logprobs as scores
from tightrope.engine.sampler.arrays import Ids
from tightrope.engine.sampler.chain import DrawResult, chains, native_params
from tightrope.engine.sampler.penalties import edit_logits
from tightrope.engine.sampler.state import SamplerState
from tightrope.kernels import dispatch

# A row's list has as many logits as the parameters suggest, and where that was too few, one of these lengths in turn.
_DEPTHS = (None, 1000, 8000, 1 << 40)
_ROWS_AT_ONCE = 16  # Lists of whole rows, and the logits of a prompt, then take a few dozen MB at most.


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, its log probability where that was asked for, and the likeliest tokens with theirs, descending.

    surprise: in bits, among the tokens that could be drawn; where mirostat or adaptive-p steers by it.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    surprise: float | None = None


def sample(logits: Tensor, states: Sequence[SamplerState], *, may_overwrite: bool = False) -> list[Sampled | None]:
    """The next token of each row, or None where nothing can be drawn: all tokens banned, or a NaN in the row.

    logits [B, V] float32, not modified unless the caller says that they may be. The states are not changed; the caller
    appends what it accepts.
    """
    if not states:
        return []
    wants_raw = any(s.wants_raw for s in states)
    in_place = may_overwrite and not wants_raw
    held = {row: state.grammar for row, state in enumerate(states) if state.grammar is not None}
    allowed = dict(zip(held, masks(list(held.values())), strict=True)) if held else {}
    edited = edit_logits(logits, [s.edits for s in states], [s.suppressed for s in states], allowed, in_place=in_place)
    edited = edited.contiguous()
    drawn, others = _draw_natively(edited, states)
    if others:
        _draw(drawn, np.array(others), edited, states)
    return _with_raw_logprobs(drawn, logits, states) if wants_raw else drawn


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Sampled]:
    """Raw log probability of each row's following token, with the row's `top` likeliest tokens.

    logits [T, V] float32, not modified; token_ids [T].
    """
    sampled: list[Sampled] = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        ids = token_ids[start : start + _ROWS_AT_ONCE]
        rows = logits[start : start + len(ids)]
        own, tops = scores.raw(rows, np.arange(len(ids)), ids, [top] * len(ids))
        sampled += [
            Sampled(token_id, None if math.isnan(logprob) else logprob, () if math.isnan(logprob) else alternatives)
            for token_id, logprob, alternatives in zip(ids, own, tops, strict=True)
        ]
    return sampled


def _draw_natively(logits: Tensor, states: Sequence[SamplerState]) -> tuple[list[Sampled | None], list[int]]:
    """What one native pass over the rows decides, and the rows that are left to the chain."""
    drawn: list[Sampled | None] = [None] * len(states)
    native = [row for row, state in enumerate(states) if state.is_native]
    if native:
        rows = np.array(native, np.int64)
        token_ids = dispatch.draw(logits, rows, native_params(logits, rows, [states[row] for row in native]))
        if token_ids is None:
            return drawn, list(range(len(states)))
        for row, token_id in zip(native, token_ids.tolist(), strict=True):
            drawn[row] = Sampled(token_id, None) if token_id >= 0 else None
    return drawn, [row for row, state in enumerate(states) if not state.is_native]


def _draw(drawn: list[Sampled | None], rows: Ids, logits: Tensor, states: Sequence[SamplerState]) -> None:
    """Draw these rows from edited logits by a short list of each, and where that is too short, by longer ones."""
    for group, chain in chains(logits, rows, states):
        lines = np.arange(len(group))
        for depth in _DEPTHS:
            unsettled: list[int] = []
            for start in range(0, len(lines), _ROWS_AT_ONCE):
                part = lines[start : start + _ROWS_AT_ONCE]
                unsettled += _take(drawn, chain.run(part, depth), group[part], part, states)
            lines = np.array(unsettled, np.int64)
        assert not len(lines), "a row that is listed whole is settled"


def _take(
    sampled: list[Sampled | None], drawn: DrawResult, rows: Ids, lines: Ids, states: Sequence[SamplerState]
) -> list[int]:
    """Take what was drawn in these rows; returns the lines that weren't settled."""
    unsettled = []
    for place, (row, line) in enumerate(zip(rows.tolist(), lines.tolist(), strict=True)):
        if not drawn.drawable[place]:
            continue
        if drawn.settled[place]:
            sampled[row] = _sampled(drawn, place, states[row])
        else:
            unsettled.append(line)
    return unsettled


def _sampled(drawn: DrawResult, place: int, state: SamplerState) -> Sampled:
    column = drawn.columns[place]
    candidates = drawn.candidates
    token_id = int(candidates.token_ids[place, column])
    weights, total = candidates.weights[place], float(candidates.total[place, 0])
    surprise = None
    if drawn.surprises is not None and state.plan.steering is not None:
        surprise = float(drawn.surprises[place])
    if not state.wants_processed:
        return Sampled(token_id, None, surprise=surprise)
    logprob = math.log(weights[column]) - math.log(total)
    top = scores.processed(weights, candidates.token_ids[place], total, state.processed_top)
    return Sampled(token_id, logprob, top, surprise)


def _with_raw_logprobs(
    drawn: list[Sampled | None], logits: Tensor, states: Sequence[SamplerState]
) -> list[Sampled | None]:
    """Add what the model itself thought of the drawn tokens, in the rows that ask for it."""
    found = {row: result for row, result in enumerate(drawn) if result is not None and states[row].wants_raw}
    if not found:
        return drawn
    tops = [request.top if (request := states[row].logprobs) is not None else 0 for row in found]
    token_ids = [result.token_id for result in found.values()]
    own, alternatives = scores.raw(logits, np.array(list(found)), token_ids, tops)
    for (row, result), logprob, top in zip(found.items(), own, alternatives, strict=True):
        drawn[row] = replace(result, logprob=logprob, top=top)
    return drawn
