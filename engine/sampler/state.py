"""What the sampler remembers of one sequence."""

import os
from collections.abc import Callable, Sequence

from tightrope.engine.guided.grammar import Matcher
from tightrope.engine.sampler.arrays import Doubles
from tightrope.engine.sampler.draw import dice
from tightrope.engine.sampler.penalties import TokenEdits
from tightrope.engine.sampler.plan import plan
from tightrope.engine.sampler.steps import SamplingParams, function
from tightrope.engine.types import LogprobRequest


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
        self.vocab_size = vocab_size  # A row of logits may be wider, for others' sake.
        self.plan = plan(params)
        self.logprobs = logprobs
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.suppressed: tuple[int, ...] = ()  # These may not be drawn now; the engine sets them between steps.
        self.grammar = grammar
        self.edits = TokenEdits(params, prompt_token_ids, vocab_size, token_bytes)
        self.num_output = 0
        self._mus: list[float] = []  # Where a step steers, each token has one, and so has the next.
        self._next_mu: Callable[[float, float, SamplingParams], float] | None = None
        if self.plan.steering is not None:
            first_mu, self._next_mu = map(function, self.plan.steering.steer)
            self._mus.append(first_mu(params))
        self.wants_processed = logprobs is not None and logprobs.processed
        self.wants_raw = logprobs is not None and not logprobs.processed
        self.processed_top = logprobs.top if logprobs is not None and logprobs.processed else 0
        self.is_native = self.plan.is_native and not self.wants_processed  # The native draw decides alone.
        self.native_params: Doubles | None = None  # Of all its tokens, but for the number that is drawn by.

    @property
    def has_complete_text(self) -> bool:
        """Whether a grammar is satisfied, and nothing can be added."""
        return self.grammar is not None and self.grammar.is_complete

    @property
    def mu(self) -> float:
        """For the next token, where a step steers: mirostat's mu, in bits, or adaptive-p's current target."""
        return self._mus[-1]

    @property
    def xtc_acts(self) -> bool:
        """What XTC's dice, thrown once a token, say of the next one."""
        return dice(self.seed, self.num_output) < self.params.xtc_probability

    def append(self, token_id: int, surprise: float | None = None) -> None:
        """A token was generated; `surprise` as the draw told it."""
        self.num_output += 1
        self.edits.append(token_id)
        if surprise is not None and self._next_mu is not None:
            self._mus.append(self._next_mu(self.mu, surprise, self.params))
        if self.grammar is not None:
            self.grammar.append(token_id)

    def resume(self, token_ids: Sequence[int], seed: int, mu: float | None) -> None:
        """Go on behind tokens that another state, with this seed, saw drawn; mu is what it had behind them."""
        self.seed = seed
        for token_id in token_ids:
            self.append(token_id)
        if mu is not None:  # Nothing goes back to before these tokens.
            self._mus += [mu] * len(token_ids)

    def mu_behind(self, num_output: int) -> float | None:
        """The mu for the token behind the first `num_output`; None where no step steers."""
        return self._mus[num_output] if self._mus else None

    def truncate(self, num_output: int) -> None:
        """Forget generated tokens after the first `num_output`; what is drawn next is what was drawn there before."""
        self.num_output = num_output
        self.edits.truncate(num_output)
        del self._mus[num_output + 1 :]
        if self.grammar is not None:
            self.grammar.truncate(num_output)
