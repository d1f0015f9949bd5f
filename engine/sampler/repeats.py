"""What a sequence is about to repeat: DRY, and n-grams that may come once only.

A run is the longest stretch of tokens that ends at some earlier place and also at the end of the sequence; the token
that followed it there would make it longer. Runs are followed token by token: a run that ends at a place has one more
token than the run that ended a place before it when the sequence was one token shorter. So a token costs one look at
where it came before, however long the context is.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tightrope.engine.limits import MAX_BREAKER_BYTES
from tightrope.engine.sampler.arrays import Doubles, Ids
from tightrope.engine.sampler.breakers import Breakers
from tightrope.engine.sampler.steps import LONGEST_RUN, SamplingParams

MAX_PENALTY = 1e30  # It keeps logits finite whatever the base.

_FEW = 1000  # Fewer tokens than this are sorted; more are counted, in an array as long as the vocabulary.


class Runs:
    """The runs of one sequence. One that is longer than LONGEST_RUN counts as that long."""

    def __init__(self, token_ids: Sequence[int], breakers: Breakers | None = None) -> None:
        """breakers: texts across which no run reaches."""
        self._breakers = breakers
        self._tokens = np.empty(max(1024, 2 * len(token_ids)), np.int32)
        self._tokens[: len(token_ids)] = token_ids
        self._size = len(token_ids)
        self._lengths = np.zeros(0, np.int32)  # One for each place: of the run that ends there.
        self._places: Ids = np.empty(0, np.int64)  # Runs end at these.
        self._rebuild()

    def append(self, token_id: int) -> None:
        if self._size == len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * self._size)
            self._lengths = np.resize(self._lengths, 2 * self._size)
            self._lengths[self._size :] = 0
        self._tokens[self._size] = token_id
        self._size += 1
        self._follow(self._size)

    def truncate(self, size: int) -> None:
        """Forget all but the first `size` tokens."""
        self._size = size
        self._rebuild()

    def following(self, least: int, window: int = 0) -> tuple[Ids, NDArray[np.int32]]:
        """Tokens that came after runs of `least` tokens or more, and the longest such run of each.

        window: runs begin among this many of the last tokens; 0 is all.
        """
        places = self._places
        lengths = self._lengths[places]
        if window > 0:
            lengths = np.minimum(lengths, places + 1 - (self._size - window))
        is_long = lengths >= least
        if not is_long.any():
            return np.empty(0, np.int64), np.empty(0, np.int32)
        tokens = self._tokens[places[is_long] + 1].astype(np.int64)
        runs = np.minimum(lengths[is_long], LONGEST_RUN).astype(np.int32)
        if len(tokens) < _FEW:
            order = np.lexsort((-runs, tokens))
            following, first = np.unique(tokens[order], return_index=True)
            return following, runs[order][first]
        longest = np.zeros(int(tokens.max()) + 1, np.int32)
        np.maximum.at(longest, tokens, runs)
        following = np.flatnonzero(longest)
        return following, longest[following]

    def all_tokens(self) -> Ids:
        return np.flatnonzero(np.bincount(self._tokens[: self._size]))

    def _rebuild(self) -> None:
        """Runs of up to LONGEST_RUN tokens are known once as many tokens have been followed."""
        self._lengths = np.zeros(len(self._tokens), np.int32)
        self._places = self._places[:0]
        for size in range(max(self._size - LONGEST_RUN, 0) + 1, self._size + 1):
            self._follow(size)

    def _follow(self, size: int) -> None:
        """Go on from the runs of the first size - 1 tokens to those of the first `size`."""
        tokens = self._tokens[: size - 1]
        places = np.flatnonzero(tokens == self._tokens[size - 1])
        if self._breakers is not None and self._breakers.ends_in(
            self._tokens[max(size - MAX_BREAKER_BYTES, 0) : size].tolist()
        ):
            places = places[:0]
        before = self._lengths[places - 1]  # Place -1 is the end of the array, which no run has reached.
        if len(places) and places[0] == 0:
            before[0] = 0
        self._lengths[self._places] = 0
        self._lengths[places] = before + 1
        self._places = places


class Repeats:
    """The penalties of one sequence's repeats: DRY's, and infinite ones for n-grams that may not come again."""

    @staticmethod
    def are_looked_for(params: SamplingParams) -> bool:
        return params.dry_multiplier > 0 or params.no_repeat_ngram_size > 0

    def __init__(
        self, params: SamplingParams, token_ids: Sequence[int], token_bytes: Callable[[int], bytes] | None
    ) -> None:
        """token_ids: of the prompt. Raises InvalidRequest when a breaker is too long."""
        self._params = params
        self._broken = self._whole = None
        if params.dry_multiplier > 0:
            breakers = None if token_bytes is None else Breakers(params.dry_sequence_breakers, token_bytes)
            self._broken = Runs(token_ids, breakers)
        if params.no_repeat_ngram_size > 0:
            self._whole = Runs(token_ids)

    def append(self, token_id: int) -> None:
        for runs in (self._broken, self._whole):
            if runs is not None:
                runs.append(token_id)

    def truncate(self, size: int) -> None:
        """Forget all but the first `size` tokens, those of the prompt included."""
        for runs in (self._broken, self._whole):
            if runs is not None:
                runs.truncate(size)

    def penalties(self) -> tuple[Ids, NDArray[np.float32]]:
        """Token ids, some perhaps twice, and what to subtract from their logits."""
        token_ids, subtract = np.empty(0, np.int64), np.empty(0)
        if self._broken is not None:
            token_ids, subtract = dry_penalties(self._broken, self._params)
        if self._whole is not None:
            banned = repeated_ngrams(self._whole, self._params.no_repeat_ngram_size)
            token_ids = np.concatenate([token_ids, banned])
            subtract = np.concatenate([subtract, np.full(len(banned), np.inf)])
        return token_ids, subtract.astype(np.float32)


def dry_penalties(runs: Runs, params: SamplingParams) -> tuple[Ids, Doubles]:
    """Token ids, and for each multiplier x base ** (length of the run that it makes longer - allowed length).

    Source: Weidmann 2024, "DRY: A modern repetition penalty", text-generation-webui pull request 5677.
    """
    token_ids, lengths = runs.following(params.dry_allowed_length, params.dry_range)
    with np.errstate(over="ignore"):
        penalties = params.dry_multiplier * np.power(params.dry_base, (lengths - params.dry_allowed_length) * 1.0)
    return token_ids, np.minimum(penalties, MAX_PENALTY)


def repeated_ngrams(runs: Runs, n: int) -> Ids:
    """The tokens that would complete n tokens which stand in the sequence already.

    Source: Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization", arXiv 1705.04304.
    """
    return runs.following(n - 1)[0] if n > 1 else runs.all_tokens()
