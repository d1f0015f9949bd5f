"""Draw the next token of every sequence of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tightrope.engine.sampler import logprobs as scores
from tightrope.engine.sampler.chain import Drawn, chains, native_params
from tightrope.engine.sampler.penalties import edit_logits
from tightrope.engine.sampler.ranking import Blocks, Ids
from tightrope.engine.sampler.reshaping import reshape_rows
from tightrope.engine.sampler.state import SamplerState
from tightrope.kernels import dispatch

# How many of a row's blocks its list looks into: as many as the parameters suggest, then, where that was too little,
# these shares, which give about 900, 4,000 and all of 50,000 tokens.
_DEPTHS = (None, 0.7, 0.99, 1.0)
_ROWS_AT_ONCE = 16  # bounds what lists of whole rows, and the logits of a prompt, take to a few dozen MB


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
    in_place = may_overwrite and not any(s.wants_raw for s in states)
    masks = [None if s.grammar is None else s.grammar.mask() for s in states]
    edited = edit_logits(logits, [s.edits for s in states], [s.suppressed for s in states], masks, in_place=in_place)
    shaped = _shape(edited, states, is_own=in_place or edited is not logits)
    drawn, rows = _draw_natively(shaped, states)
    blocks = None
    if len(rows):
        blocks = Blocks(shaped)
        if all(s.params.temperature == 0 and not s.wants_processed for s in states):
            drawn = _greedy(blocks)
        else:
            _draw(drawn, rows, shaped, blocks, states)
    return _with_raw_logprobs(drawn, logits, blocks if shaped is logits else None, states)


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


def _shape(logits: Tensor, states: Sequence[SamplerState], *, is_own: bool) -> Tensor:
    """Apply the steps that take whole rows; the logits themselves change only where they are our own."""
    heads = [(row, state.plan.head, state.params) for row, state in enumerate(states) if state.plan.head]
    if not heads:
        return logits
    shaped = logits if is_own else logits.clone()
    reshape_rows(shaped, heads)
    return shaped


def _draw_natively(logits: Tensor, states: Sequence[SamplerState]) -> tuple[list[Sampled | None], Ids]:
    """What one native pass over the rows decides, and the rows that are left to the chain."""
    is_native = [state.plan.is_native and not state.wants_processed for state in states]
    token_ids = dispatch.draw(logits, native_params(states)) if any(is_native) else None
    if token_ids is None:
        return [None] * len(states), np.arange(len(states))
    token_ids[~np.array(is_native)] = dispatch.UNSETTLED
    drawn = [Sampled(token_id, None) if token_id >= 0 else None for token_id in token_ids.tolist()]
    return drawn, np.flatnonzero(token_ids == dispatch.UNSETTLED)


def _draw(
    sampled: list[Sampled | None], rows: Ids, logits: Tensor, blocks: Blocks, states: Sequence[SamplerState]
) -> None:
    """Draw these rows from edited logits by a short list of each, and where that is too short, by longer ones."""
    for group, chain in chains(states, rows[np.isfinite(blocks.top[rows, 0])], logits.shape[1]):
        totals = chain.totals(logits if len(group) == len(logits) else logits[group], blocks.top[group])
        lines = np.arange(len(group))
        for share in _DEPTHS:
            unsettled: list[int] = []
            for start in range(0, len(lines), _ROWS_AT_ONCE):
                part = lines[start : start + _ROWS_AT_ONCE]
                wanted = [chain.num_listed[line] if share is None else int(share * blocks.num) for line in part]
                drawn = chain.run(part, blocks.rank(group[part], wanted), totals)
                for place, (line, is_settled) in enumerate(zip(part.tolist(), drawn.settled.tolist(), strict=True)):
                    if is_settled:
                        sampled[group[line]] = _sampled(drawn, place, states[group[line]])
                    else:
                        unsettled.append(line)
            lines = np.array(unsettled, np.int64)
        assert not len(lines), "a row that is listed whole is settled"


def _sampled(drawn: Drawn, place: int, state: SamplerState) -> Sampled:
    column = drawn.columns[place]
    candidates = drawn.candidates
    token_id = int(candidates.token_ids[place, column])
    weights, total = candidates.weights[place], float(candidates.total[place, 0])
    surprise = None
    if drawn.surprises is not None and state.plan.is_steered:
        surprise = float(drawn.surprises[place])
    if not state.wants_processed:
        return Sampled(token_id, None, surprise=surprise)
    logprob = math.log(weights[column] / total)
    top = scores.processed(weights, candidates.token_ids[place], total, state.processed_top)
    return Sampled(token_id, logprob, top, surprise)


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
    for row, logprob, top in zip(rows, own, alternatives, strict=True):
        result = drawn[row]
        assert result is not None
        drawn[row] = replace(result, logprob=logprob, top=top)
    return drawn
