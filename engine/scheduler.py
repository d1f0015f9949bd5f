"""Which sequences run in the next step, and on how many tokens each.

A step has a budget of tokens and of time. Every sequence that is writing gets its one token first, so a long prompt
can't make it wait; what is left goes to prompts, by the policy that `Scheduler.schedule` tells. When the cache is full,
the youngest running sequence gives its place back and starts again later, from what the cache still holds of it. Where
a backend can't mix adapters, a step takes the sequences of one alone, and engine/adapter_turns.py says of which.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from tightrope.backends.errors import BackendError
from tightrope.backends.protocol import Chunk, KVCache, WantLogits
from tightrope.engine.adapter_turns import AdapterTurns
from tightrope.engine.guidance import Guide
from tightrope.engine.sequence import AdapterUse, Sequence

DECODE_HEADROOM = 32  # tokens of output that must have room before a sequence starts, lest it be preempted at once
MIN_CHUNK = 16  # tokens; smaller chunks of a prompt cost a whole step for next to nothing
# While nobody writes, a step of prompts takes so long, in seconds: a prompt that comes waits for half of it on average.
# The weights are read once for at least as many tokens as MIN_QUIET_CHUNK, whose products take far longer than that.
QUIET_STEP_S, MIN_QUIET_CHUNK = 0.5, 64
OLDEST_SHARE = 0.25  # of a step's prompt budget, for the prompt that came first, whatever else there is
PATIENCE_S = 60.0  # the longest that smaller prompts may be admitted ahead of the first that doesn't fit the cache


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of the step: its next `num_tokens` pending tokens, and as many of its guide as are told.

    is_scored: each of its tokens' logits is looked at, which takes far longer than to compute them.
    """

    sequence: Sequence
    num_tokens: int
    num_guide_tokens: int = 0
    is_scored: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the next token can be drawn afterwards."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def num_run(self) -> int:
        """Tokens that the model runs."""
        return self.num_tokens + self.num_guide_tokens

    @property
    def is_of_prompt(self) -> bool:
        """Whether it is more than the one token of an answer."""
        return self.num_run > len(self.sequence.seq_ids)


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

    def __init__(self, first: int) -> None:
        """first: what is tried before a step has told."""
        self._first = first
        self._tokens_per_s: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        if num_tokens <= 0 or seconds <= 0:
            return
        rate = num_tokens / seconds
        self._tokens_per_s = rate if self._tokens_per_s is None else 0.7 * self._tokens_per_s + 0.3 * rate

    def tokens_in(self, seconds: float) -> int:
        return self._first if self._tokens_per_s is None else int(self._tokens_per_s * seconds)

    def seconds_of(self, num_tokens: int) -> float:
        return 0.0 if self._tokens_per_s is None else num_tokens / self._tokens_per_s


@dataclass(slots=True)
class _Budget:
    """What prompts may take of a step. Time is in seconds; `kept` is the share that is kept for the oldest of them."""

    tokens: int
    seconds: float
    least: int  # tokens for the first prompt and for the oldest, however slow the model is
    kept: float = 0.0
    taken: int = 0
    spent_s: float = 0.0

    def tokens_for(self, rate: PrefillRate, *, at_least: int) -> int:
        seconds = self.seconds * (1 - self.kept) - self.spent_s
        fitting = max(rate.tokens_in(max(0.0, seconds)), at_least)
        return min(fitting, int(self.tokens * (1 - self.kept)) - self.taken)


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
        self._unfit: set[Sequence] = set()  # waiting ones that didn't fit the cache, since something was last freed
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._rate, self._scored_rate = PrefillRate(4 * MIN_CHUNK), PrefillRate(MIN_CHUNK)
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
            self._unfit.clear()
        else:
            self.waiting.remove(sequence)
            self._unfit.discard(sequence)

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

    def observe(self, step: list[Work], seconds: float) -> None:
        """Learn from a step that took so long, in seconds, with what was done with its logits."""
        plain = sum(work.num_run for work in step if work.is_of_prompt and not work.is_scored)
        scored = sum(work.num_run for work in step if work.is_scored)
        if scored:
            self._scored_rate.observe(scored, seconds - self._rate.seconds_of(plain))
        elif plain >= MIN_CHUNK:  # fewer take as long as one
            self._rate.observe(plain, seconds)

    def schedule(self, now_s: float) -> list[Work]:
        """Choose the next step's work; room for it is reserved.

        Empty only when nothing is waiting or running, or nothing that waits fits the empty cache.

        The policy, for prompts that are read at the same time: shortest remaining first, and a quarter of each step for
        the oldest. The one with the fewest tokens left goes first, because it delays the others least, so the mean time
        to a first token is the smallest that there is (Schrage 1968, "A Proof of the Optimality of the Shortest
        Remaining Processing Time Discipline"): a line of 20 tokens doesn't wait for a window of 24,000. By itself that
        would starve a long prompt for as long as short ones come. So whichever came first has OLDEST_SHARE of every
        step, and the rest too while it is alone; each prompt becomes the oldest in its time, and none takes longer than
        four times what it takes alone after that. A step is bounded in time always: to QUIET_STEP_S while nobody
        writes, to `busy_step_s` while somebody does, or is about to because a prompt ends in this step. Prompts whose
        tokens are all scored count by what that takes. One that doesn't fit the cache is passed over by those that do,
        until it has waited for PATIENCE_S; then what gets free is kept for it.
        """
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
        is_busy = any(sequence.is_decoding for sequence in self.running)
        budget = _Budget(
            self._max_step_tokens - sum(work.num_run for work in step),
            self._busy_step_s if is_busy else max(QUIET_STEP_S, self._busy_step_s),
            MIN_CHUNK if is_busy else MIN_QUIET_CHUNK,
        )
        prompts = [s for s in self.running if may_run(s) and not s.is_decoding]
        prompts += [s for s in self.waiting if may_run(s) and (s.leader is None or s.leader.is_prompt_computed)]
        if not prompts or budget.tokens <= 0:
            return step
        if not self.running:
            self._unfit.clear()
        oldest = next((s for s in sorted(prompts, key=lambda s: s.arrived_s) if self._start(s, now_s)), None)
        prompts.sort(key=lambda s: (s.num_output == 0, s.num_pending))  # those that have begun to write first
        if oldest is not None and prompts[0] is not oldest:
            prompts.remove(oldest)
            prompts.append(oldest)
            budget.kept = OLDEST_SHARE
        for sequence in prompts:
            self._add_prompt(step, sequence, budget, now_s, is_oldest=sequence is oldest)
        return step

    def _add_prompt(
        self, step: list[Work], sequence: Sequence, budget: _Budget, now_s: float, *, is_oldest: bool
    ) -> None:
        """Give a prompt its part of the step, if there is any left and it can start."""
        if is_oldest:
            budget.kept = 0.0
        rate = self._scored_rate if sequence.needs_own_prompt else self._rate
        has_minimum = is_oldest or not budget.taken
        # the time of scored tokens is their own: few of them make no step dearer
        least = 1 if sequence.needs_own_prompt else budget.least
        num_tokens = budget.tokens_for(rate, at_least=least if has_minimum else 0)
        is_crumb = not has_minimum and num_tokens < min(MIN_CHUNK, sequence.num_pending)
        if num_tokens <= 0 or is_crumb or not self._start(sequence, now_s):
            return
        spent = self._add_chunk(step, sequence, num_tokens)
        budget.taken += spent
        budget.spent_s += rate.seconds_of(spent)
        if spent and step[-1].is_last:  # its first token comes with this step
            budget.seconds, budget.least = min(budget.seconds, self._busy_step_s), MIN_CHUNK

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
        self._unfit.add(sequence)
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
        work = Work(sequence, max(0, num_tokens), num_guide, sequence.needs_own_prompt)
        if work.num_run > 0:
            step.append(work)
        return work.num_run

    def _start(self, sequence: Sequence, now_s: float) -> bool:
        """Whether a prompt runs: already, or from now on, if there is a place and room in the cache."""
        if sequence in self.running:
            return True
        if sequence in self._unfit or self._num_places(*self.running, sequence) > self._max_num_seqs:
            return False
        if any(s.arrived_s < min(sequence.arrived_s, now_s - PATIENCE_S) for s in self._unfit):
            return False
        if not self._open(sequence):
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.started_s is None:
            sequence.started_s = now_s
        return True

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
            self._unfit.add(sequence)
            return False
        sequence.num_computed = num_cached
        if sequence.num_output == 0:
            sequence.num_cached = num_cached
        return True


def _uses(use: AdapterUse, sequence: Sequence) -> bool:
    return sequence.adapter_use == use
