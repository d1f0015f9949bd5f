"""Which sequences run in the next step, and on how many tokens each.

A step has a token budget. Every sequence that is writing gets its one token first, so a long prompt can't make it
wait; what is left goes to prompts, oldest first, cut into chunks. While answers are being written, the prompt part
of a step is also bounded in time. When the cache is full, the youngest running sequence gives its place back and
starts again later, from what the cache still holds of it. Where a backend can't mix adapters, a step takes the
sequences of one alone, and engine/turns.py says of which.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from tightrope.backends.errors import BackendError
from tightrope.backends.protocol import Chunk, KVCache, WantLogits
from tightrope.engine.guidance import Guide
from tightrope.engine.sequence import AdapterUse, Sequence
from tightrope.engine.turns import AdapterTurns

DECODE_HEADROOM = 32  # tokens of output that must have room before a sequence starts, lest it be preempted at once
MIN_BUSY_PREFILL = 16  # tokens; smaller chunks of a prompt cost a whole step for next to nothing


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of the step: its next `num_tokens` pending tokens, and as many of its guide as are told."""

    sequence: Sequence
    num_tokens: int
    num_guide_tokens: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the next token can be drawn afterwards."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def num_run(self) -> int:
        """Tokens that the model runs."""
        return self.num_tokens + self.num_guide_tokens


def chunks(work: Work) -> list[Chunk]:
    """The sequence's part, then its guide's; a part may have no tokens in this step."""
    sequence, request = work.sequence, work.sequence.request
    last: WantLogits = "last" if work.is_last and request.stop.max_tokens != 0 else "none"
    want: WantLogits = "all" if sequence.needs_own_prompt else last
    parts: list[tuple[Sequence | Guide, int, WantLogits]] = [(sequence, work.num_tokens, want)]
    if sequence.guide is not None:
        parts.append((sequence.guide, work.num_guide_tokens, last))
    return [
        Chunk(
            one.seq_id,
            one.token_ids[one.num_computed : one.num_computed + num_tokens],
            one.num_computed,
            wanted,
            sequence.adapter,
            request.adapter_scale,
        )
        for one, num_tokens, wanted in parts
        if num_tokens > 0
    ]


class PrefillRate:
    """How many prompt tokens fit a given time, learned from the steps so far."""

    def __init__(self) -> None:
        self._tokens_per_s: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        if num_tokens < MIN_BUSY_PREFILL or seconds <= 0:
            return
        rate = num_tokens / seconds
        self._tokens_per_s = rate if self._tokens_per_s is None else 0.7 * self._tokens_per_s + 0.3 * rate

    def tokens_in(self, seconds: float) -> int:
        if self._tokens_per_s is None:
            return 4 * MIN_BUSY_PREFILL
        return max(MIN_BUSY_PREFILL, int(self._tokens_per_s * seconds))


class Scheduler:
    """Owns the queues; the cache's bookkeeping is called from here and nowhere else."""

    def __init__(
        self,
        kv: KVCache,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        busy_step_s: float,
        max_prompt_rows: int,
        mixes_adapters: bool,
    ) -> None:
        self._kv = kv
        self._max_num_seqs = max_num_seqs
        self._max_step_tokens = max_step_tokens
        self._max_prompt_rows = max_prompt_rows
        self._busy_step_s = busy_step_s
        self._turns = None if mixes_adapters else AdapterTurns()
        self._seq_ids = count()
        self._has_room = True  # False: the head of the queue didn't fit, and nothing was freed since
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.rate = PrefillRate()
        self.preemptions = 0

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out, finished or not. keep: its cached tokens stay matchable."""
        if sequence in self.running:
            self.running.remove(sequence)
            for seq_id in sequence.seq_ids:
                self._kv.close(seq_id, keep=keep)
            self._has_room = True
        else:
            self.waiting.remove(sequence)

    def commit(self, work: Work) -> None:
        """Record that the part has run."""
        sequence = work.sequence
        end = sequence.num_computed + work.num_tokens
        self._kv.commit(sequence.seq_id, sequence.token_ids[sequence.num_computed : end])
        sequence.num_computed = end
        if (guide := sequence.guide) is not None:
            end = guide.num_computed + work.num_guide_tokens
            self._kv.commit(guide.seq_id, guide.token_ids[guide.num_computed : end])
            guide.num_computed = end

    def rewind(self, sequence: Sequence) -> None:
        """Follow a running sequence that has lost tokens at its end: the last of the rest runs again, for its logits.

        Where the cache can't go back there, the sequence starts again, from what is cached of it.
        """
        written: list[Sequence | Guide] = [sequence] if sequence.guide is None else [sequence, sequence.guide]
        try:
            for one in written:
                one.num_computed = len(one.token_ids) - 1
                if one.num_computed > 0:
                    self._kv.truncate(one.seq_id, one.num_computed)
        except BackendError:
            sequence.num_computed = 0
        if any(one.num_computed == 0 for one in written):
            self.remove(sequence)
            sequence.restart()
            self.waiting.appendleft(sequence)

    def schedule(self, now_s: float) -> list[Work]:
        """Choose the next step's work; room for it is reserved. Empty only when nothing is waiting or running."""
        if self._turns is None:
            return self._step_of(lambda sequence: True, now_s)
        for use in self._turns.order((*self.running, *self.waiting), now_s):
            step = self._step_of(partial(_uses, use), now_s)
            if step:
                self._turns.take(use, now_s)
                return step
        return []

    def _step_of(self, may_run: Callable[[Sequence], bool], now_s: float) -> list[Work]:
        step = self._decodes(may_run)
        budget = self._max_step_tokens - sum(work.num_run for work in step)
        if any(sequence.is_decoding for sequence in self.running):
            budget = min(budget, self.rate.tokens_in(self._busy_step_s))
        for sequence in [s for s in self.running if may_run(s) and not s.is_decoding]:
            budget -= self._add_chunk(step, sequence, budget)
        while budget > 0 and (admitted := self._admit(may_run, now_s)) is not None:
            budget -= self._add_chunk(step, admitted, budget)
        return step

    def _decodes(self, may_run: Callable[[Sequence], bool]) -> list[Work]:
        """One token for every sequence that is writing; preempts from the young end until all have room."""
        step = []
        for sequence in [s for s in self.running if may_run(s) and s.is_decoding]:
            while sequence in self.running and not all(self._kv.reserve(seq_id, 1) for seq_id in sequence.seq_ids):
                self._preempt(self.running[-1])
            if sequence in self.running:
                step.append(Work(sequence, 1, len(sequence.seq_ids) - 1))
        return [work for work in step if work.sequence in self.running]

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        sequence.restart()
        self.waiting.appendleft(sequence)
        self._has_room = False
        self.preemptions += 1

    def _add_chunk(self, step: list[Work], sequence: Sequence, budget: int) -> int:
        """Give a prompt what the budget allows; return the tokens spent."""
        guide = sequence.guide
        # A guide's prompt runs first, but for its last token: that one runs beside the last of its sequence's.
        num_guide = 0 if guide is None else min(guide.num_pending - 1, budget)
        budget -= num_guide
        num_tokens = min(sequence.num_pending, budget)
        if sequence.is_reproducible and 1 < num_tokens == sequence.num_pending:
            num_tokens -= 1
        if sequence.needs_own_prompt:
            taken = sum(work.num_tokens for work in step if work.sequence.needs_own_prompt)
            num_tokens = min(num_tokens, self._max_prompt_rows - taken)
        if guide is not None and num_tokens == sequence.num_pending:
            if guide.num_pending == 1 and num_tokens < budget:
                num_guide = 1
            else:
                num_tokens -= 1
        work = Work(sequence, max(0, num_tokens), num_guide)
        if work.num_run > 0:
            step.append(work)
        return work.num_run

    def _admit(self, may_run: Callable[[Sequence], bool], now_s: float) -> Sequence | None:
        """Start the next waiting sequence, if there is one that may start and fits."""
        if len(self.running) >= self._max_num_seqs or not (self._has_room or not self.running):
            return None
        startable = (s for s in self.waiting if s.leader is None or s.leader.is_prompt_computed)
        sequence = next(filter(may_run, startable), None)
        if sequence is None or self._num_places(*self.running, sequence) > self._max_num_seqs:
            return None
        if not self._open(sequence):
            return None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.started_s is None:
            sequence.started_s = now_s
        return sequence

    @staticmethod
    def _num_places(*sequences: Sequence) -> int:
        return sum(len(sequence.seq_ids) for sequence in sequences)

    def _open(self, sequence: Sequence) -> bool:
        """Pin what is cached of the sequence and reserve the rest; nothing has changed if that fails."""
        if sequence.prompt_tokens is not None and not sequence.is_announced:
            sequence.prompt_tokens = []  # it may have been preempted half-way
        num_cached = self._kv.open(
            sequence.seq_id,
            sequence.token_ids,
            sequence.namespace,
            reuse=not sequence.needs_own_prompt,
            reproducible=sequence.is_reproducible,
        )
        headroom = max(0, min(DECODE_HEADROOM, sequence.max_len - 1 - len(sequence.token_ids)))  # the last never runs
        has_room = self._kv.reserve(sequence.seq_id, len(sequence.token_ids) - num_cached + headroom)
        if has_room and (guide := sequence.guide) is not None:
            guide.num_computed = self._kv.open(guide.seq_id, guide.token_ids, sequence.namespace)
            has_room = self._kv.reserve(guide.seq_id, guide.num_pending + headroom)
            if not has_room:
                self._kv.close(guide.seq_id, keep=True)
        if not has_room:
            self._kv.close(sequence.seq_id, keep=True)  # what it had found stays to be found
            self._has_room = False
            return False
        sequence.num_computed = num_cached
        if sequence.num_output == 0:
            sequence.num_cached = num_cached
        return True


def _uses(use: AdapterUse, sequence: Sequence) -> bool:
    return sequence.adapter_use == use
