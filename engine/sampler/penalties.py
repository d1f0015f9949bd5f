"""What each sequence adds to and takes from its logits: penalties and biases, kept as a short list of tokens."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.grammar import Packed
from tightrope.engine.sampler.repeats import Repeats
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.sampler.watermark import Watermark

Floats = NDArray[np.float32]


class TokenEdits:
    """The tokens of one sequence whose logits change, and how: logit / divide (or x divide, if negative) - subtract.

    Follows the output token by token: `append` is O(1), so a long context costs nothing but the size of its list. Only
    penalties that fade are counted anew for each token.
    What would repeat the context is found by `repeats`, where that is asked for.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """Raises InvalidRequest when a bias or ban names a token that isn't there, or a breaker is too long."""
        for name, token_ids in (("logit_bias", params.logit_bias), ("banned_tokens", params.banned_tokens)):
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequest(
                        f"{name} names token {token_id}, but token ids go from 0 to {vocab_size - 1}", name
                    )
        self._params = params
        self._biases = params.logit_bias | dict.fromkeys(params.banned_tokens, -np.inf)
        gamma, delta = params.watermark_gamma, params.watermark_delta
        self.watermark = Watermark(gamma, delta, prompt_token_ids, vocab_size) if delta else None
        self.repeats = Repeats(params, prompt_token_ids, token_bytes) if Repeats.are_looked_for(params) else None
        self._counts_tokens = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
            or params.relative_frequency_penalty != 0.0
        )
        self.is_neutral = not self._counts_tokens and not self._biases  # But for repeats and the watermark.
        self.is_idle = self.is_neutral and self.repeats is None and self.watermark is None  # No logit ever changes.
        self._decay = params.repetition_decay if params.penalty_range > 0 else 0
        self._num_prompt = len(prompt_token_ids)
        self._history = list(prompt_token_ids) if self._counts_tokens else []
        self._rebuild()

    def append(self, token_id: int) -> None:
        """A token was generated."""
        if self.watermark is not None:
            self.watermark.append(token_id)
        if self.repeats is not None:
            self.repeats.append(token_id)
        if not self._counts_tokens:
            return
        self._history.append(token_id)
        if self._decay:
            return  # Each token's penalty changes with every token, so `entries` counts anew.
        self._count(token_id, 1, is_output=True)
        window = self._params.penalty_range
        if window > 0:
            leaving = len(self._history) - 1 - window
            if leaving >= 0:
                self._count(self._history[leaving], -1, is_output=leaving >= self._num_prompt)
            if self._size > 2 * window + len(self._biases) + 256:
                self._rebuild()  # Slots of tokens that left the range are freed, seldom enough to keep append O(1).

    def truncate(self, num_output: int) -> None:
        """Forget the output after its first `num_output` tokens."""
        if self.watermark is not None:
            self.watermark.truncate(num_output)
        if self.repeats is not None:
            self.repeats.truncate(self._num_prompt + num_output)
        if self._counts_tokens:
            del self._history[self._num_prompt + num_output :]
            self._rebuild()

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Distinct token ids [U], `divide` [U] and `subtract` [U]; views that the next `append` changes."""
        if self._decay:
            self._rebuild()
        subtract = self._subtract[: self._size]
        if relative := self._params.relative_frequency_penalty:
            length = float(self._seen[: self._size].sum())
            subtract = subtract + self._seen[: self._size] * np.float32(relative / max(length, 1.0))
        return self._token_ids[: self._size], self._divide[: self._size], subtract

    def _rebuild(self) -> None:
        """Count everything anew."""
        params, bias = self._params, self._biases
        window = params.penalty_range
        start = max(len(self._history) - window - self._decay, 0) if window > 0 else 0
        tokens = np.asarray(self._history[start:], dtype=np.int64)
        strengths = fade(len(tokens), window, self._decay)
        token_ids = np.unique(np.concatenate([tokens, np.fromiter(bias, np.int64, len(bias))]))
        self._size = len(token_ids)
        self._token_ids = token_ids
        self._slots = {int(token_id): slot for slot, token_id in enumerate(token_ids)}
        slots = np.searchsorted(token_ids, tokens)
        output = slice(max(self._num_prompt - start, 0), None)
        self._seen, latest = self._sums(slots, strengths)
        self._generated, latest_generated = self._sums(slots[output], strengths[output])
        self._bias = np.zeros(self._size, np.float32)
        for token_id, value in bias.items():
            self._bias[self._slots[token_id]] = value
        self._divide = 1 + latest * np.float32(params.repetition_penalty - 1)
        self._subtract = (
            self._generated * np.float32(params.frequency_penalty)
            + latest_generated * np.float32(params.presence_penalty)
            - self._bias
        ).astype(np.float32)

    def _sums(self, slots: NDArray[np.int64], strengths: NDArray[np.float32]) -> tuple[Floats, Floats]:
        """The strengths of each token's places, summed, and the largest of them, which is that of the latest."""
        most = np.zeros(self._size, np.float32)
        np.maximum.at(most, slots, strengths)
        return np.bincount(slots, strengths, self._size).astype(np.float32), most

    def _count(self, token_id: int, change: int, *, is_output: bool) -> None:
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._new_slot(token_id)
        self._seen[slot] += change
        self._divide[slot] = self._params.repetition_penalty if self._seen[slot] > 0 else 1.0
        if is_output:
            self._generated[slot] += change
            generated = float(self._generated[slot])
            self._subtract[slot] = (
                generated * self._params.frequency_penalty
                + (generated > 0) * self._params.presence_penalty
                - float(self._bias[slot])
            )

    def _new_slot(self, token_id: int) -> int:
        slot = self._size
        if slot == len(self._token_ids):
            room = max(64, slot)
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, np.int64)])
            self._seen = np.concatenate([self._seen, np.zeros(room, np.float32)])
            self._generated = np.concatenate([self._generated, np.zeros(room, np.float32)])
            self._bias = np.concatenate([self._bias, np.zeros(room, np.float32)])
            self._divide = np.concatenate([self._divide, np.ones(room, np.float32)])
            self._subtract = np.concatenate([self._subtract, np.zeros(room, np.float32)])
        self._token_ids[slot] = token_id
        self._slots[token_id] = slot
        self._size = slot + 1
        return slot


def fade(num_tokens: int, window: int, decay: int) -> Floats:
    """How much each of the last tokens counts: the last `window` and the one before them 1, those before ever less.

    Source: exllamav2's `token_repetition_decay` (exllamav2_ext/cpp/sampling.cpp).
    """
    if decay == 0:
        return np.ones(num_tokens, np.float32)
    distance = np.arange(num_tokens - 1, -1, -1)
    return np.clip(1 - (distance - window) / decay, 0, 1).astype(np.float32)


def edit_logits(
    logits: Tensor,
    edits: Sequence[TokenEdits],
    suppressed: Sequence[tuple[int, ...]],
    masks: Mapping[int, Packed],
    *,
    in_place: bool = False,
) -> Tensor:
    """Apply each row's edits, then set its suppressed tokens, and those that its mask excludes if it has one, to -inf.

    The watermark comes first, then penalties and biases, and DRY's penalties after them.

    logits [B, V] float32; comes back as it is when no row changes anything, else as a changed copy, or changed itself.
    """
    is_idle, suppresses = all(edit.is_idle for edit in edits), any(suppressed)
    if is_idle and not suppresses and not masks:
        return logits
    is_own = in_place and logits.is_contiguous()
    edited = logits if is_own else logits.clone(memory_format=torch.contiguous_format)
    if not is_idle:
        _edit(edited, edits)
    if suppresses:
        _suppress(edited, suppressed)
    if masks:
        _exclude(edited, list(masks), np.stack(list(masks.values())))
    return edited


def _edit(edited: Tensor, edits: Sequence[TokenEdits]) -> None:
    rows = [row for row, edit in enumerate(edits) if not edit.is_neutral]
    repeats = [(row, edit.repeats) for row, edit in enumerate(edits) if edit.repeats is not None]
    marks = [(row, edit.watermark) for row, edit in enumerate(edits) if edit.watermark is not None]
    flat = edited.view(-1)
    for row, mark in marks:
        mark.add_to(edited[row])
    if rows:
        entries = [edits[row].entries() for row in rows]
        offsets = np.repeat(np.asarray(rows, np.int64) * edited.shape[1], [len(ids) for ids, _, _ in entries])
        places = _to(np.concatenate([ids for ids, _, _ in entries]) + offsets, flat)
        divide = _to(np.concatenate([d for _, d, _ in entries]), flat)
        subtract = _to(np.concatenate([s for _, _, s in entries]), flat)
        values = flat.index_select(0, places)
        flat.scatter_(0, places, torch.where(values > 0, values / divide, values * divide) - subtract)
    for row, repeat in repeats:
        repeated, penalties = repeat.penalties()
        if len(repeated):
            edited[row].index_add_(0, _to(repeated, flat), _to(penalties, flat), alpha=-1)


def _suppress(logits: Tensor, suppressed: Sequence[tuple[int, ...]]) -> None:
    """Set these tokens of each row [B, V] to -inf."""
    if logits.is_cpu:
        array = logits.numpy()  # For a few places, numpy takes a fifth of torch's time.
        for row, ids in enumerate(suppressed):
            if ids:
                array[row, ids] = -np.inf
        return
    places = [row * logits.shape[1] + token_id for row, ids in enumerate(suppressed) for token_id in ids]
    logits.view(-1)[torch.tensor(places, device=logits.device)] = -torch.inf


def _exclude(logits: Tensor, rows: Sequence[int], allowed: Packed) -> None:
    """Set what the masks [len(rows), V / 8] don't allow in these rows to -inf."""
    bits = np.unpackbits(~allowed, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    banned = torch.from_numpy(bits).to(logits.device)
    if len(rows) == len(logits):
        logits.masked_fill_(banned, -torch.inf)
        return
    for line, row in enumerate(rows):
        logits[row].masked_fill_(banned[line], -torch.inf)


def _to(array: NDArray[np.int64] | NDArray[np.float32], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
