"""What the sampler remembers of one sequence."""

import os
from collections.abc import Callable, Sequence

from tightrope.engine.guided.grammar import Matcher
from tightrope.engine.sampler import adaptive, mirostat
from tightrope.engine.sampler.penalties import TokenEdits
from tightrope.engine.sampler.plan import plan
from tightrope.engine.types import LogprobRequest, SamplingParams


class SamplerState:
    """The parameters of one sequence, its seed, and what its output did to its penalties."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        logprobs: LogprobRequest | None,
        grammar: Matcher | None = None,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """token_bytes: what a token adds to the text; without it, DRY has no breakers.

        Raises InvalidRequest when a bias or ban names a token that isn't there, or a breaker is too long.
        """
        self.params = params
        self.vocab_size = vocab_size  # a row of logits may be wider, for others' sake
        self.plan = plan(params)
        self.logprobs = logprobs
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.suppressed: tuple[int, ...] = ()  # ids that may not be drawn now; the engine sets them between steps
        self.grammar = grammar
        self.edits = TokenEdits(params, prompt_token_ids, vocab_size, token_bytes)
        self.num_output = 0
        first = mirostat.first_mu(params.mirostat_tau) if params.mirostat_mode else params.adaptive_target
        self._aims = [first]  # of the step that steers, one a token and one for the next
        self.wants_processed = logprobs is not None and logprobs.processed
        self.wants_raw = logprobs is not None and not logprobs.processed
        self.processed_top = logprobs.top if logprobs is not None and logprobs.processed else 0

    @property
    def has_complete_text(self) -> bool:
        """Whether a grammar is satisfied, and nothing can be added."""
        return self.grammar is not None and self.grammar.is_complete

    @property
    def aim(self) -> float:
        """For the next token: mirostat's in bits, or the probability that adaptive-p would like."""
        return self._aims[-1]

    def append(self, token_id: int, surprise: float | None = None) -> None:
        """A token was generated; `surprise` as the draw told it."""
        self.num_output += 1
        self.edits.append(token_id)
        if surprise is not None:
            params = self.params
            if params.mirostat_mode:
                aim = mirostat.next_mu(self.aim, surprise, params.mirostat_tau, params.mirostat_eta)
            else:
                aim = adaptive.next_aim(self.aim, 2.0**-surprise, params.adaptive_target, params.adaptive_decay)
            self._aims.append(aim)
        if self.grammar is not None:
            self.grammar.append(token_id)

    def truncate(self, num_output: int) -> None:
        """Forget generated tokens after the first `num_output`; what is drawn next is what was drawn there before."""
        self.num_output = num_output
        self.edits.truncate(num_output)
        del self._aims[num_output + 1 :]
        if self.grammar is not None:
            self.grammar.truncate(num_output)
