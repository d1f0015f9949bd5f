"""Which replica runs a prompt: the one where its first token comes soonest, as far as can be told beforehand.

All is counted in tokens of a prompt that are to be computed: what a replica would have to compute of this prompt
itself, what others wait for there, and what answers that are being written take from it meanwhile. Where nobody holds
anything that is the least loaded one. No clock is looked at. `python -m bench.routed` shows what the weights do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tightrope.backends.holdings import BLOCK, COPY_SHARE

# A token that is computed takes the place of a cached one, which somebody will have to compute again.
COMPUTED_WEIGHT = 2.0
# While one more answer is being written, a prompt takes as much longer as if it had so many tokens more.
RUNNING_TOKENS = 32
# Where no place is free, a newcomer waits for the end of an answer, for which prompts of so many tokens could be read.
FULL_TOKENS = 2048
# A chat that fills its window loses what stands in front. Its replica moves what stands behind that, which no hash of
# a beginning tells. Where the session's last prompt is known to be there still, so much of this one is there, too, as
# long as its beginning is; where that isn't known, the half of the rest counts as there.
MOVED_SHARE = 0.5
# Among replicas that are about equal a session stays on its own.
SESSION_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may run a prompt.

    cached, stored, read_share: see Found in digests.py. queued_tokens: of prompts that wait or are being read there, to
    be computed; num_queued: how many these are, 0 where nobody knows. num_running: answers that are being written.
    is_full: no place is free. is_session: the session's last prompt ran here; session_tokens: so many it had, if all of
    it is still cached here.
    """

    replica: str
    cached: int = 0
    stored: int = 0
    read_share: float = COPY_SHARE
    queued_tokens: int = 0
    num_running: int = 0
    is_full: bool = False
    is_session: bool = False
    session_tokens: int = 0
    num_queued: int = 0


def cost(prompt_tokens: int, candidate: Candidate) -> float:
    """What running a prompt there costs until its first token, it and others, in tokens to be computed."""
    held = candidate.cached + candidate.stored
    unknown: float = max(0, prompt_tokens - held)
    if candidate.is_session and held >= BLOCK:
        is_known = candidate.session_tokens > 0
        unknown = max(0, min(unknown, prompt_tokens - candidate.session_tokens)) if is_known else unknown * MOVED_SHARE
    own = unknown + candidate.read_share * candidate.stored
    load = _queued(own, candidate) + RUNNING_TOKENS * candidate.num_running + FULL_TOKENS * candidate.is_full
    return COMPUTED_WEIGHT * own + load - SESSION_TOKENS * candidate.is_session


def _queued(own: float, candidate: Candidate) -> float:
    """What others take before a prompt of `own` tokens: an engine reads the shortest first, so none more than that."""
    if candidate.num_queued:
        return min(candidate.queued_tokens, candidate.num_queued * max(own, BLOCK))
    return candidate.queued_tokens


def choose(prompt_tokens: int, candidates: Sequence[Candidate], rng: Random) -> str:
    """The replica for a prompt of so many tokens; equal ones take turns by chance. There is one candidate at least."""
    costs = [cost(prompt_tokens, candidate) for candidate in candidates]
    least = min(costs)
    return rng.choice([c.replica for c, its in zip(candidates, costs, strict=True) if its == least])
