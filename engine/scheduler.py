"""Which sequences run in the next step, and on how many tokens each.

A step has a budget of tokens and of time. Every sequence that is writing gets its one token first, so a long prompt
can't make it wait; what is left goes to prompts, by the policy that `Scheduler.schedule` tells. When the cache is full,
the youngest running sequence gives its place back and starts again later, from what the cache still holds of it. Where
a backend can't mix adapters, a step takes the sequences of one alone, and engine/adapter_turns.py says of which.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

from tightrope.backends.errors import BackendError
from tightrope.backends.protocol import Capabilities, Chunk, KVCache
from tightrope.backends.reuse import Reuse
from tightrope.engine.adapter_turns import AdapterTurns
from tightrope.engine.healing import Healing
from tightrope.engine.sequence import AdapterUse, Sequence
from tightrope.engine.settings import LimitSettings
from tightrope.engine.step_budget import PrefillRate, StepBudget
from tightrope.engine.track import Shares, Track
from tightrope.engine.work import Work

DECODE_HEADROOM = 32  # So many tokens of output must have room before a sequence starts, lest it be preempted at once.
MIN_CHUNK = 16  # Smaller chunks of a prompt, in tokens, cost a whole step for next to nothing.
# While nobody writes, a step of prompts takes so long, in seconds: a prompt that comes waits for half of it on average.
# The weights are read once for at least as many tokens as MIN_QUIET_CHUNK, whose products take far longer than that.
QUIET_STEP_S, MIN_QUIET_CHUNK = 0.5, 64
# It takes up to half as long again where that ends the only prompt: a step for the few tokens left would take longer.
QUIET_STRETCH = 1.5
OLDEST_SHARE = 0.25  # The prompt that came first has this share of a step's prompt budget, whatever else there is.
# A removal is at the front of a chat if so many turns have ended before it, the system message among them, and no more
# than half of the prompt stands there. Exact tokens behind another removal are waited for if they take less than this.
MOST_TURNS_IN_FRONT, MOST_WAIT_S = 1, 10.0
MOST_FETCHES = 2  # So many prompts have a part of what is kept outside the cache brought back in one step.
PATIENCE_S = 60.0  # Smaller prompts may be admitted for so long ahead of the first that doesn't fit the cache.


class Scheduler:
    """Owns the queues; the cache's bookkeeping is called from here, and from `healing` while they are empty."""

    def __init__(self, kv: KVCache, capabilities: Capabilities, limits: LimitSettings) -> None:
        self._kv = kv
        self._max_num_seqs = capabilities.max_num_seqs
        self._max_step_tokens = capabilities.max_step_tokens
        self._max_prompt_rows = capabilities.max_prompt_rows
        self._steady_tokens = capabilities.steady_tokens
        self._busy_step_s = limits.busy_step_ms / 1e3
        self._turns = None if capabilities.mixes_adapters else AdapterTurns()
        self._fetching: set[Sequence] = set()  # The cache was asked to fetch for these in this step, and has to go on.
        self._unfit: set[Sequence] = set()  # These wait, and didn't fit the cache since something was last freed.
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # The oldest stands first.
        self._rate, self._scored_rate = PrefillRate(4 * MIN_CHUNK), PrefillRate(MIN_CHUNK)
        self.preemptions = 0
        self.healing = Healing(kv, self._rate, capabilities.max_step_tokens, limits.heal)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running) or self.healing.has_work

    def add(self, sequence: Sequence) -> None:
        self.healing.pause()
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out for good; what it holds of moved tokens is to be healed."""
        if sequence in self.running:
            self.healing.add(sequence)
        self.remove(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out, finished or not. keep: its cached tokens stay matchable."""
        if sequence in self.running:
            self.running.remove(sequence)
            for track in sequence.tracks:
                self._kv.close(track.seq_id, keep=keep)
            self._unfit.clear()
        else:
            self.waiting.remove(sequence)
            self._unfit.discard(sequence)

    def commit(self, work: Work) -> None:
        """Record that the part has run."""
        for track, share in work.shares:
            for places in track.pending.take(share):
                self._kv.commit(track.seq_id, places.start, track.token_ids[places.start : places.stop])

    def rewind(self, sequence: Sequence) -> None:
        """Follow a running sequence that has lost tokens at its end: what is pending of the rest isn't cached.

        Where the cache can't go back there, the sequence starts again, from what is cached of it.
        """
        try:
            for track in sequence.tracks:
                self._kv.truncate(track.seq_id, len(track.token_ids) - track.pending.count)
            can_go_on = sequence.is_decoding
        except BackendError:
            can_go_on = False
        if not can_go_on:
            self._restart(sequence)

    def next_healing(self) -> Chunk | None:
        """What to run while nothing else does, in a step as short as if somebody wrote; then tell `healing.commit`."""
        return self.healing.next(self._busy_step_s)

    def observe_healing(self, num_tokens: int, seconds: float) -> None:
        """Learn from such a step."""
        if num_tokens >= MIN_CHUNK:
            self._rate.observe(num_tokens, seconds)

    def observe(self, step: list[Work], seconds: float) -> None:
        """Learn from a step that took so long, in seconds, with what was done with its logits."""
        prompts = [work for work in step if work.is_of_prompt]
        plain = sum(work.num_run for work in prompts if not work.is_scored)
        scored = sum(work.num_run for work in prompts if work.is_scored)
        if scored:
            self._scored_rate.observe(scored, seconds - self._rate.seconds_of(plain))
        elif plain >= MIN_CHUNK:  # Fewer take as long as one.
            self._rate.observe(plain, seconds)

    def schedule(self, now_s: float) -> list[Work]:
        """Choose the next step's work; room for it is reserved.

        All that a step is, is how many of its pending tokens each track runs: the rest of a prompt, a part of it and
        the one token of an answer are the same thing, and so is whatever else a sequence computes beside its own. Empty
        only when nothing is waiting or running, or nothing that waits fits the empty cache.

        The policy, for prompts that are read at the same time: shortest remaining first, and a quarter of each step for
        the oldest. The one with the fewest tokens left goes first, because it delays the others least, so the mean time
        to a first token is the smallest that there is (Schrage 1968, "A Proof of the Optimality of the Shortest
        Remaining Processing Time Discipline"): a line of 20 tokens doesn't wait for a window of 24,000. By itself that
        would starve a long prompt for as long as short ones come. So whichever came first has OLDEST_SHARE of every
        step, and the rest too while it is alone; each prompt becomes the oldest in its time, and none takes longer than
        four times what it takes alone after that. A step is bounded in time always: to QUIET_STEP_S while nobody
        writes, and half as much again where that ends the only prompt; to `busy_step_s` while somebody does, or is
        about to because a prompt ends in this step. Prompts whose tokens are all scored count by what that takes. One
        that doesn't fit the cache is passed over by those that do, until it has waited for PATIENCE_S; then what gets
        free is kept for it.
        """
        self._fetching.clear()
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
        writing = {work.sequence for work in step}
        prompts = [s for s in self.running if s not in writing and may_run(s)]
        if self._num_places < self._max_num_seqs:  # Under overload there is no place, and many wait.
            prompts += [s for s in self.waiting if may_run(s) and (s.leader is None or s.leader.is_prompt_computed)]
        if not prompts:
            return step
        is_busy = any(sequence.is_decoding for sequence in self.running)
        budget = StepBudget(
            self._max_step_tokens - sum(work.num_run for work in step),
            self._busy_step_s if is_busy else max(QUIET_STEP_S, self._busy_step_s),
            MIN_CHUNK if is_busy else MIN_QUIET_CHUNK,
            max(0, self._max_prompt_rows - sum(work.is_scored for work in step)),
            QUIET_STRETCH if not is_busy and len(prompts) == 1 else 1.0,
        )
        if budget.tokens <= 0:
            return step
        if not self.running:
            self._unfit.clear()
        oldest = next((s for s in sorted(prompts, key=lambda s: s.arrived_s) if self._start(s, now_s)), None)
        prompts.sort(key=lambda s: (s.num_output == 0, s.num_pending))  # Those that have begun to write go first.
        if oldest is not None and prompts[0] is not oldest:
            prompts.remove(oldest)
            prompts.append(oldest)
            budget.kept = OLDEST_SHARE
        for sequence in prompts:
            self._add_prompt(step, sequence, budget, now_s, is_oldest=sequence is oldest)
        return step

    def _add_prompt(
        self, step: list[Work], sequence: Sequence, budget: StepBudget, now_s: float, *, is_oldest: bool
    ) -> None:
        """Give a prompt its part of the step, if there is any left and it can start."""
        if is_oldest:
            budget.kept = 0.0
        is_scored = sequence.needs_own_prompt
        rate = self._scored_rate if is_scored else self._rate
        has_minimum = is_oldest or not budget.taken
        # the time of scored tokens is their own: few of them make no step dearer
        least = 1 if is_scored else budget.least
        num_tokens = budget.tokens_for(rate, sequence.num_pending, at_least=least if has_minimum else 0)
        is_crumb = not has_minimum and num_tokens < min(MIN_CHUNK, sequence.num_pending)
        if num_tokens <= 0 or is_crumb or not self._start(sequence, now_s):
            return
        if sequence.is_same_each_time and self._is_alone and len(sequence.tracks) == 1:
            num_tokens = _steady(num_tokens, sequence.num_pending, self._steady_tokens)
        work = self._replayed(sequence, budget, num_tokens)
        if work is None:
            work = _part(sequence, num_tokens, budget.prompt_rows if is_scored else num_tokens)
        if not work.num_run:
            return
        step.append(work)
        budget.taken += work.num_run
        budget.spent_s += rate.seconds_of(work.num_run)
        budget.prompt_rows -= work.shares[0][1] if is_scored else 0
        if work.is_last:  # Its first token comes with this step.
            budget.seconds, budget.least = min(budget.seconds, self._busy_step_s), MIN_CHUNK

    def _replayed(self, sequence: Sequence, budget: StepBudget, num_tokens: int) -> Work | None:
        """The step that another engine ran there; None where there was none, or nothing depends on it.

        It runs whole, however long it takes, since nobody else waits for it: beside others nothing is promised.
        """
        if sequence.replay is None:
            return None
        if not self._is_alone:
            sequence.replay = None
            return None
        shares = sequence.replay.next(sequence.tracks, num_tokens, budget.tokens) or sequence.one_each
        num_run = sum(share for _, share in shares)
        return Work(sequence, shares, num_run, num_run == sequence.num_pending, is_scored=False)

    @property
    def _is_alone(self) -> bool:
        """Whether there is one sequence at most."""
        return len(self.running) + len(self.waiting) <= 1

    def _decodes(self, may_run: Callable[[Sequence], bool]) -> list[Work]:
        """One token for every sequence that is writing; preempts from the young end until all have room."""
        step = []
        for sequence in [s for s in self.running if may_run(s) and s.is_decoding]:
            tracks = sequence.tracks
            while sequence in self.running and not all(self._kv.reserve(track.seq_id, 1) for track in tracks):
                preempted = self.running[-1]
                self._restart(preempted)
                self._unfit.add(preempted)
                self.preemptions += 1
            if sequence in self.running:
                step.append(Work(sequence, sequence.one_each, len(tracks), True, sequence.needs_own_prompt))
        return [work for work in step if work.sequence in self.running]

    def _restart(self, sequence: Sequence) -> None:
        """Send a running sequence back to where it waits first; what the cache keeps of it is found again."""
        self.remove(sequence)
        for track in sequence.tracks:
            track.begin(Reuse())
        self.waiting.appendleft(sequence)

    @property
    def _num_places(self) -> int:
        """How many places are taken: each track of a running sequence has one."""
        return sum(len(sequence.tracks) for sequence in self.running)

    def _start(self, sequence: Sequence, now_s: float) -> bool:
        """Whether a prompt runs: already, or from now on, if there is a place and room in the cache."""
        if sequence in self.running:
            return True
        if sequence in self._unfit or self._num_places + len(sequence.tracks) > self._max_num_seqs:
            return False
        if any(s.arrived_s < min(sequence.arrived_s, now_s - PATIENCE_S) for s in self._unfit):
            return False
        if self.running and not self._is_fetched(sequence):
            return False
        if not self._open(sequence):
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.started_s is None:
            sequence.started_s = now_s
        return True

    def _is_fetched(self, sequence: Sequence) -> bool:
        """Whether what is kept of a prompt outside the cache has come; others go on meanwhile."""
        if sequence in self._fetching or len(self._fetching) == MOST_FETCHES:
            return False
        for track in sequence.tracks:
            wanted = sequence.wanted(track)
            if not self._kv.fetch(track.seq_id, track.token_ids, sequence.namespace, reuse=wanted):
                self._fetching.add(sequence)
                return False
        return True

    def _open(self, sequence: Sequence) -> bool:
        """Pin what is cached of the sequence and reserve the rest; nothing has changed if that fails."""
        if sequence.prompt_tokens is not None and not sequence.is_announced:
            sequence.prompt_tokens = []  # It may have been preempted half-way.
        own = sequence.own
        headroom = max(0, min(DECODE_HEADROOM, sequence.max_len - 1 - len(own.token_ids)))  # The last never runs.
        for number, track in enumerate(sequence.tracks, 1):
            found = self._kv.open(
                track.seq_id,
                track.token_ids,
                sequence.namespace,
                reuse=sequence.wanted(track),
                accepts=partial(self._num_accepted, sequence, track),
                reproducible=sequence.is_reproducible,
                steady=sequence.is_greedy,
            )
            track.begin(found)
            if not self._kv.reserve(track.seq_id, track.pending.count + headroom):
                for opened in sequence.tracks[:number]:
                    self._kv.close(opened.seq_id, keep=True)  # What it had found stays to be found.
                    opened.begin(Reuse())
                self._unfit.add(sequence)
                return False
        if sequence.num_output == 0:
            sequence.num_cached, sequence.num_moved = len(own.token_ids) - own.pending.count, own.num_inexact
        sequence.steps.begin()
        return True

    def _num_accepted(self, sequence: Sequence, track: Track, found: Reuse) -> int:
        """In how many of a prompt's first tokens those that aren't exact are taken.

        A chat that fills its window loses what stands in front, and is answered at once. What was taken out elsewhere
        is to be gone: moved tokens behind it still hold some of it, and are taken only where exact ones would take
        long. So a note that is written anew at each turn has only what stands behind its last place computed.
        """
        eos_ids = sequence.writer.tokenizer.eos_ids
        for place in found.removals():
            num_ended = sum(token_id in eos_ids for token_id in track.token_ids[:place])
            if num_ended > MOST_TURNS_IN_FRONT or place > len(track.token_ids) / 2:
                num_behind = found.num_tokens - found.before(place).num_tokens
                return place if self._rate.seconds_of(num_behind) < MOST_WAIT_S else found.stop
        return found.stop


def _part(sequence: Sequence, num_tokens: int, num_own: int) -> Work:
    """A prompt's part of a step, of at most `num_tokens` in all and `num_own` of its own track; it may be empty.

    Its own track comes after the others. The last tokens of all of them run in one step, because what is drawn depends
    on the logits of all; and, where a seed promises the same text again, they run without the tokens before them.
    """
    left = num_tokens
    shares: Shares = []
    for track in reversed(sequence.tracks):
        share = min(track.pending.count - 1, left, num_own if track is sequence.own else left)
        shares.insert(0, (track, share))
        left -= share
    num_run = num_tokens - left
    is_last = (
        num_run == sequence.num_pending - len(shares)
        and left >= len(shares)
        and shares[0][1] < num_own
        and not (sequence.is_reproducible and num_run > 0)
    )
    if is_last:
        shares, num_run = [(track, share + 1) for track, share in shares], sequence.num_pending
    return Work(sequence, shares, num_run, is_last, sequence.needs_own_prompt)


def _steady(num_tokens: int, num_pending: int, least: int) -> int:
    """About so many of the tokens that are left, or all, so that neither this step nor the rest has fewer than `least`.

    A greedy answer then comes out the same whatever of its prompt was cached, and a seeded one however fast the
    machine was.
    """
    if num_tokens >= num_pending:
        return num_tokens
    return num_pending if num_pending < 2 * least else min(max(num_tokens, least), num_pending - least)


def _uses(use: AdapterUse, sequence: Sequence) -> bool:
    return sequence.adapter_use == use
