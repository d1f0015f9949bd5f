"""The seam between the process that embeds and its models: token ids in, one row of numbers for each text out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tightrope.backends.embedding.card import Cut, EmbedderCard

Rows = np.ndarray[Any, np.dtype[np.float32]]


class TooLong(Exception):
    """A text has more tokens than the model takes, which the message tells."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__(f"has {num_tokens} tokens; the model takes at most {max_tokens}")
        self.num_tokens, self.max_tokens = num_tokens, max_tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text, or a query and a text, as the model reads it. type_ids: 0 for the query, 1 for the text behind it."""

    ids: Sequence[int]
    type_ids: Sequence[int] | None = None


class Embedder(Protocol):
    """One model. All of it belongs to one thread."""

    card: EmbedderCard

    def encode(self, text: str, query: str | None, cut: Cut) -> Tokens:
        """The tokens of a text with the special ones around it, or of a query and a text. Raises TooLong.

        What looks like a special token in them is text. cut: what is left out of a longer one; of the query nothing.
        """

    def run(self, texts: Sequence[Tokens], threads: int) -> Rows:
        """[n, D] float32: the pooled vectors as the model has them, of any length, or [n, 1] logits of a reranker.

        Raises BackendError.
        """

    def close(self) -> None: ...


def checked_length(num_tokens: int, max_tokens: int, cut: Cut) -> int:
    """How many tokens too many there are. Raises TooLong where nothing is to be left out."""
    if num_tokens > max_tokens and cut == "no":
        raise TooLong(num_tokens, max_tokens)
    return max(0, num_tokens - max_tokens)
