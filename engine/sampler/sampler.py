"""Draw the next token of every sequence of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightrope.engine.sampler import logprobs as scores
from tightrope.engine.sampler.candidates import argmax, rank, rank_all
from tightrope.engine.sampler.chain import Chain
from tightrope.engine.sampler.penalties import edit_logits
from tightrope.engine.sampler.state import SamplerState

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
    if all(s.params.temperature == 0 and not _wants_processed(s) for s in states):
        drawn = _greedy(edited)
    else:
        drawn = _draw(edited, states)
    return _with_raw_logprobs(drawn, logits, states)


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Sampled]:
    """Raw log probability of each row's following token, with the row's `top` likeliest tokens.

    logits [T, V] float32, not modified; token_ids [T].
    """
    sampled: list[Sampled] = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        ids = token_ids[start : start + _ROWS_AT_ONCE]
        rows = logits[start : start + len(ids)]
        own, tops = scores.raw(rows, torch.tensor(ids, device=rows.device), [top] * len(ids))
        sampled += [
            Sampled(token_id, None if math.isnan(logprob) else logprob, () if math.isnan(logprob) else alternatives)
            for token_id, logprob, alternatives in zip(ids, own, tops, strict=True)
        ]
    return sampled


def _greedy(logits: Tensor) -> list[Sampled | None]:
    values, token_ids = argmax(logits)
    return [
        Sampled(token_id, None) if math.isfinite(value) else None
        for token_id, value in zip(token_ids.tolist(), values.tolist(), strict=True)
    ]


def _draw(logits: Tensor, states: Sequence[SamplerState], *, whole: bool = False) -> list[Sampled | None]:
    """Draw from edited logits by a short list of each row, and where that is too short, by the whole row."""
    chain = Chain(states, logits.shape[1], logits.device)
    ranking = rank_all(logits) if whole else rank(logits, chain.num_listed)
    drawn = chain.run(logits, ranking)
    kept = drawn.candidates
    tops = [s.logprobs.top if s.logprobs is not None and s.logprobs.processed else 0 for s in states]
    settled, valid = drawn.settled, ranking.top.isfinite()
    if any(tops):
        wanted = torch.tensor(tops, device=logits.device)[:, None]
        settled = settled & (kept.is_complete | ((kept.weights > 0).sum(1, keepdim=True) >= wanted))
    # One small transfer; a token id below 2**53 is exact in float64.
    columns = (drawn.token_ids, drawn.logprobs, kept.total, settled, valid)
    table = torch.cat([column.double() for column in columns], 1).tolist()
    weights, token_ids = (kept.weights.cpu().numpy(), ranking.token_ids.cpu().numpy()) if any(tops) else (None, None)
    sampled: list[Sampled | None] = []
    unsettled: list[int] = []
    for row, (token_id, logprob, total, is_settled, is_valid) in enumerate(table):
        sampled.append(None)
        if not is_valid:
            continue
        if not is_settled and not whole:
            unsettled.append(row)
            continue
        top: scores.Top = ()
        if weights is not None and token_ids is not None:
            top = scores.processed(weights[row], token_ids[row], total, tops[row])
        sampled[row] = Sampled(int(token_id), logprob if _wants_processed(states[row]) else None, top)
    if unsettled:
        again = _draw(logits[unsettled], [states[row] for row in unsettled], whole=True)
        for row, result in zip(unsettled, again, strict=True):
            sampled[row] = result
    return sampled


def _with_raw_logprobs(
    drawn: list[Sampled | None], logits: Tensor, states: Sequence[SamplerState]
) -> list[Sampled | None]:
    """Add what the model itself thought of the drawn tokens, in the rows that ask for it."""
    rows: list[int] = []
    tops: list[int] = []
    token_ids: list[int] = []
    for row, (result, state) in enumerate(zip(drawn, states, strict=True)):
        if result is not None and state.logprobs is not None and not state.logprobs.processed:
            rows.append(row)
            tops.append(state.logprobs.top)
            token_ids.append(result.token_id)
    if not rows:
        return drawn
    wanted = logits if len(rows) == len(logits) else logits[rows]
    own, alternatives = scores.raw(wanted, torch.tensor(token_ids, device=logits.device), tops)
    for row, token_id, logprob, top in zip(rows, token_ids, own, alternatives, strict=True):
        drawn[row] = Sampled(token_id, logprob, top)
    return drawn


def _wants_processed(state: SamplerState) -> bool:
    return state.logprobs is not None and state.logprobs.processed
