"""One stream of tokens in the cache: an answer's own, or another that is computed beside it."""

from dataclasses import dataclass, field

from tightrope.backends.reuse import Reuse
from tightrope.engine.pending import Pending


@dataclass(slots=True, eq=False)
class Track:
    """A stream as the cache knows it: all of its tokens but the pending ones are stored there."""

    seq_id: int
    token_ids: list[int]
    pending: Pending = field(init=False)  # These must run before the next token can be drawn.
    num_inexact: int = field(init=False)  # So many were found that aren't what computing them would give.

    def __post_init__(self) -> None:
        self.begin(Reuse())

    def begin(self, reuse: Reuse) -> None:
        """Have everything pending that isn't found."""
        self.pending = Pending(reuse.missing(len(self.token_ids)))
        self.num_inexact = reuse.num_inexact

    def append(self, token_id: int) -> None:
        """Add a token, which is yet to run."""
        self.pending.append(len(self.token_ids))
        self.token_ids.append(token_id)

    def take_back(self, num_tokens: int) -> None:
        """Remove the last tokens; the last of the rest runs again, for its logits."""
        del self.token_ids[-num_tokens:]
        self.pending = Pending([range(len(self.token_ids) - 1, len(self.token_ids))])


Shares = list[tuple[Track, int]]  # Each track runs so many of its next tokens.
