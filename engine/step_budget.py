"""How much of a step prompts may take, in tokens and in time."""

from dataclasses import dataclass


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
class StepBudget:
    """What prompts may take of a step. Time is in seconds; `kept` is the share that is kept for the oldest of them."""

    tokens: int
    seconds: float
    least: int  # The first prompt and the oldest get so many tokens, however slow the model is.
    prompt_rows: int  # So many tokens of scored prompts may run.
    stretch: float = 1.0  # So many times as many tokens are taken where these are the last of a prompt.
    kept: float = 0.0
    taken: int = 0
    spent_s: float = 0.0

    def tokens_for(self, rate: PrefillRate, num_pending: int, *, at_least: int) -> int:
        """How many of a prompt's pending tokens may run."""
        seconds = self.seconds * (1 - self.kept) - self.spent_s
        fitting = max(rate.tokens_in(max(0.0, seconds)), at_least)
        if fitting < num_pending <= self.stretch * fitting:
            fitting = num_pending
        return min(fitting, int(self.tokens * (1 - self.kept)) - self.taken)
