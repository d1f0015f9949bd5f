"""The seam between the front and the embedding models: texts in, vectors or scores out."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tightrope.backends.embedding.card import Cut, EmbedderCard

Text = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of texts; see Embed. model: the place of its card."""

    model: int
    query: str | None = None
    cut: Cut = "no"
    dimensions: int | None = None
    norm: int = 2


@dataclass(frozen=True, slots=True)
class Vectors:
    """A row of float32 for each text, little-endian, and the number of its tokens."""

    rows: tuple[bytes, ...]
    num_tokens: tuple[int, ...]

    def floats(self, place: int) -> list[float]:
        return array("f", self.rows[place]).tolist()


class EmbeddingEngine(Protocol):
    """The embedding and reranking models of one server. All of it belongs to one event loop."""

    @property
    def is_there(self) -> bool:
        """Whether the settings name any model."""

    @property
    def cards(self) -> Sequence[EmbedderCard]:
        """The models, once they are loaded."""

    @property
    def is_ready(self) -> bool:
        """Whether texts are taken now."""

    @property
    def num_open(self) -> int:
        """Requests that have not been answered."""

    @property
    def num_requests(self) -> int:
        """Requests that were answered; `num_texts` and `num_tokens` are those of them."""

    @property
    def num_texts(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def restarts(self) -> int: ...

    @property
    def private_bytes(self) -> int:
        """Memory that its process has to itself."""

    async def start(self) -> None:
        """Begin to load the models; returns at once."""

    async def wait_ready(self) -> None:
        """Wait until texts are taken; return at once where there are no models.

        Raises BackendFailed with one line if they won't be.
        """

    async def close(self) -> None:
        """End the engine. What is still under way ends with EngineUnavailable."""

    def check_ready(self) -> None:
        """Raises EngineUnavailable while no texts are taken; those that come during a restart wait for its end."""

    async def embed(self, texts: Sequence[Text], wanted: Wanted) -> Vectors:
        """Vectors of texts, or their scores. Raises EngineError; to be cancelled when nobody wants them any more."""
