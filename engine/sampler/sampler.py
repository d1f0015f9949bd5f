"""Draw the next token of every sequence of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tightrope.engine.sampler import logprobs as scores
from tightrope.engine.sampler.chain import Chain, Drawn, native_params
from tightrope.engine.sampler.penalties import edit_logits
from tightrope.engine.sampler.ranking import Blocks, Ids, Ranking
from tightrope.engine.sampler.state import SamplerState
from tightrope.kernels import dispatch

# How many of a row's blocks its list looks into: as many as the parameters suggest, then, where that was too little,
# these shares, which give about 900, 4,000 and all of 50,000 tokens.
_DEPTHS = (None, 0.7, 0.99, 1.0)
_ROWS_AT_ONCE = 16  # bounds what lists of whole rows, and the logits of a prompt, take to a few dozen MB


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, its log probability where that was asked for, and the likeliest tokens with theirs, descending."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, states: Sequence[SamplerState], *, may_overwrite: bool = False) -> list[Sampled | None]:
    """The next token of each row, or None where nothing can be drawn: all tokens banned, or a NaN in the row.

    logits [B, V] float32, not modified unless the caller says that they may be. The states are not changed; the caller
    appends what it accepts.
    """
    if not states:
        return []
    in_place = may_overwrite and not any(s.wants_raw for s in states)
    masks = [None if s.grammar is None else s.grammar.mask() for s in states]
    edited = edit_logits(logits, [s.edits for s in states], [s.suppressed for s in states], masks, in_place=in_place)
    drawn, rows = _draw_natively(edited, states)
    blocks = None
    if len(rows):
        blocks = Blocks(edited)
        if all(s.params.temperature == 0 and not s.wants_processed for s in states):
            drawn = _greedy(blocks)
        else:
            _draw(drawn, rows, edited, blocks, states)
    return _with_raw_logprobs(drawn, logits, blocks if edited is logits else None, states)


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Sampled]:
    """Raw log probability of each row's following token, with the row's `top` likeliest tokens.

    logits [T, V] float32, not modified; token_ids [T].
    """
    sampled: list[Sampled] = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        ids = token_ids[start : start + _ROWS_AT_ONCE]
        rows = logits[start : start + len(ids)]
        own, tops = scores.raw(rows, None, ids, [top] * len(ids))
        sampled += [
            Sampled(token_id, None if math.isnan(logprob) else logprob, () if math.isnan(logprob) else alternatives)
            for token_id, logprob, alternatives in zip(ids, own, tops, strict=True)
        ]
    return sampled


def _greedy(blocks: Blocks) -> list[Sampled | None]:
    return [
        Sampled(token_id, None) if math.isfinite(value) else None
        for token_id, value in zip(blocks.argmax().tolist(), blocks.top[:, 0].tolist(), strict=True)
    ]


def _draw_natively(logits: Tensor, states: Sequence[SamplerState]) -> tuple[list[Sampled | None], Ids]:
    """What one native pass over the rows decides, and the rows that are left to the chain."""
    if all(s.wants_processed for s in states):
        return [None] * len(states), np.arange(len(states))
    token_ids = dispatch.draw(logits, native_params(states))
    if token_ids is None:
        return [None] * len(states), np.arange(len(states))
    for row, state in enumerate(states):
        if state.wants_processed:
            token_ids[row] = dispatch.UNSETTLED
    drawn = [Sampled(token_id, None) if token_id >= 0 else None for token_id in token_ids.tolist()]
    return drawn, np.flatnonzero(token_ids == dispatch.UNSETTLED)


def _draw(
    sampled: list[Sampled | None], rows: Ids, logits: Tensor, blocks: Blocks, states: Sequence[SamplerState]
) -> None:
    """Draw these rows from edited logits by a short list of each, and where that is too short, by longer ones."""
    chain = Chain(states)
    totals = chain.totals(logits, blocks.top)
    rows = rows[np.isfinite(blocks.top[rows, 0])]
    for share in _DEPTHS:
        unsettled: list[int] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            wanted = [chain.num_listed[row] if share is None else int(share * blocks.num) for row in part]
            ranking = blocks.rank(part, wanted)
            drawn = chain.run(part, ranking, totals)
            for line, (row, is_settled) in enumerate(zip(part.tolist(), drawn.settled.tolist(), strict=True)):
                if is_settled:
                    sampled[row] = _sampled(ranking, drawn, line, states[row])
                else:
                    unsettled.append(row)
        rows = np.array(unsettled, np.int64)
    assert not len(rows), "a row that is listed whole is settled"


def _sampled(ranking: Ranking, drawn: Drawn, line: int, state: SamplerState) -> Sampled:
    column = drawn.columns[line]
    token_id = int(ranking.token_ids[line, column])
    if not state.wants_processed:
        return Sampled(token_id, None)
    weights, total = drawn.candidates.weights[line], float(drawn.candidates.total[line, 0])
    top = scores.processed(weights, ranking.token_ids[line], total, state.processed_top)
    return Sampled(token_id, math.log(weights[column] / total), top)


def _with_raw_logprobs(
    drawn: list[Sampled | None], logits: Tensor, blocks: Blocks | None, states: Sequence[SamplerState]
) -> list[Sampled | None]:
    """Add what the model itself thought of the drawn tokens, in the rows that ask for it.

    blocks: those of `logits`, if they are known.
    """
    rows: list[int] = []
    tops: list[int] = []
    token_ids: list[int] = []
    for row, (result, state) in enumerate(zip(drawn, states, strict=True)):
        if result is not None and state.wants_raw:
            assert state.logprobs is not None
            rows.append(row)
            tops.append(state.logprobs.top)
            token_ids.append(result.token_id)
    if not rows:
        return drawn
    if len(rows) < len(logits):
        logits, blocks = logits[rows], None
    own, alternatives = scores.raw(logits, blocks, token_ids, tops)
    for row, token_id, logprob, top in zip(rows, token_ids, own, alternatives, strict=True):
        drawn[row] = Sampled(token_id, logprob, top)
    return drawn
