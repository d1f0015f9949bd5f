"""Draw the next token of every sequence of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tightrope.engine.sampler import logprobs as scores
from tightrope.engine.sampler.chain import Chain, Drawn
from tightrope.engine.sampler.penalties import edit_logits
from tightrope.engine.sampler.ranking import Blocks, Doubles, Ranking
from tightrope.engine.sampler.state import SamplerState

_DEPTHS = (0.7, 0.99, 1.0)  # share of the blocks that a longer list looks into: 900, 4,000, all of 50,000 tokens
_ROWS_AT_ONCE = 32  # of a prompt's logits; bounds the copies to a few MB


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, its log probability where that was asked for, and the likeliest tokens with theirs, descending."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled | None]:
    """The next token of each row, or None where nothing can be drawn: all tokens banned, or a NaN in the row.

    logits [B, V] float32, not modified. The states are not changed; the caller appends what it accepts.
    """
    if not states:
        return []
    edited = edit_logits(logits, [s.edits for s in states], [s.suppressed for s in states])
    blocks = Blocks(edited)
    if all(s.params.temperature == 0 and not s.wants_processed for s in states):
        drawn = _greedy(blocks)
    else:
        drawn = _draw(edited, blocks, states)
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


def _draw(logits: Tensor, blocks: Blocks, states: Sequence[SamplerState]) -> list[Sampled | None]:
    """Draw from edited logits by a short list of each row, and where that is too short, by longer ones."""
    chain = Chain(states)
    totals = chain.totals(logits, blocks.top)
    ranking = blocks.rank(chain.num_listed)
    drawn = chain.run(ranking, totals)
    sampled: list[Sampled | None] = []
    for row, state in enumerate(states):
        if not math.isfinite(blocks.top[row, 0]):
            sampled.append(None)
        elif drawn.settled[row]:
            sampled.append(_sampled(ranking, drawn, row, state))
        else:
            sampled.append(_draw_deep(blocks, chain, row, totals, state))
    return sampled


def _draw_deep(blocks: Blocks, chain: Chain, row: int, totals: Doubles, state: SamplerState) -> Sampled:
    """Draw from one row by lists that grow until one suffices; the last is the whole vocabulary."""
    rows = slice(row, row + 1)
    for share in _DEPTHS:
        ranking = blocks.rank([int(share * blocks.num)], first=row)
        drawn = chain.run(ranking, totals[rows], rows)
        if drawn.settled[0]:
            break
    return _sampled(ranking, drawn, 0, state)


def _sampled(ranking: Ranking, drawn: Drawn, row: int, state: SamplerState) -> Sampled:
    column = drawn.columns[row]
    token_id = int(ranking.token_ids[row, column])
    if not state.wants_processed:
        return Sampled(token_id, None)
    weights, total = drawn.candidates.weights[row], float(drawn.candidates.total[row, 0])
    top = scores.processed(weights, ranking.token_ids[row], total, state.processed_top)
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
