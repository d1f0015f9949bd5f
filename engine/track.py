"""One stream of tokens in the cache: an answer's own, or another that is computed beside it."""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Track:
    """A stream as the cache knows it: the first `num_computed` of its tokens are stored there."""

    seq_id: int
    token_ids: list[int]
    num_computed: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens that must run before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed
