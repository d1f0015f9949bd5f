"""What a replica's work takes, as measured, and how its engine cuts it into steps."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

from tightrope.backends.hf.cache.moving import COMPUTED_AGAIN, LONG_FRONT, MIN_AGAIN
from tightrope.backends.settings import STEP_TOKENS, ModelSettings
from tightrope.engine.scheduler import MIN_CHUNK, MIN_QUIET_CHUNK, OLDEST_SHARE, QUIET_STEP_S, QUIET_STRETCH
from tightrope.engine.settings import LimitSettings


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one replica's processor.

    A prompt token takes `token_s`, and `pair_s` more for each token before it (attention). A step in which `n` answers
    that have `c` cached tokens together get a token each takes `step_s + n * stream_s + c * cached_s`.
    """

    overhead_s: float  # of a request, from its arrival to its first step, and of its first event on the way back
    token_s: float
    pair_s: float
    step_s: float
    stream_s: float
    cached_s: float
    host_token_s: float  # of a token that comes back from the machine's memory
    disk_token_s: float  # of one that comes back from disk

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> "Costs":
        """From a result's JSON, which may say more."""
        return cls(**{one.name: float(found[one.name]) for one in fields(cls)})

    def times(self, factor: float) -> "Costs":
        """The same, all so many times as long."""
        return Costs(*(factor * seconds for seconds in astuple(self)))

    def prefill_s(self, first: int, number: int) -> float:
        """Of `number` prompt tokens behind `first` others."""
        return number * self.token_s + self.pair_s * number * (first + number / 2)

    def tokens_in(self, first: int, seconds: float) -> int:
        """How many prompt tokens behind `first` others fit a time, as the engine reckons from its last steps."""
        return int(seconds / (self.token_s + self.pair_s * first))

    def decode_s(self, number: int, num_cached: int) -> float:
        """Of one step of so many answers."""
        return self.step_s + number * self.stream_s + num_cached * self.cached_s


@dataclass(frozen=True, slots=True)
class Shape:
    """What a replica is: room in tokens, and the engine's own constants of its steps."""

    cache_tokens: int = 16 * 4096
    host_tokens: int = 16 * 4096
    max_num_seqs: int = ModelSettings().max_num_seqs
    max_step_tokens: int = STEP_TOKENS  # of a CPU
    busy_step_s: float = LimitSettings().busy_step_ms / 1e3
    quiet_step_s: float = QUIET_STEP_S
    stretch: float = QUIET_STRETCH
    oldest_share: float = OLDEST_SHARE
    least_busy: int = MIN_CHUNK
    least_quiet: int = MIN_QUIET_CHUNK

    def recomputed(self, before: int) -> int:
        """Tokens behind a gap, with so many before it, that are computed again at once: see the cache's moving.py."""
        return min(COMPUTED_AGAIN, max(MIN_AGAIN, LONG_FRONT - before))
