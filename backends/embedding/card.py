"""What is told of an embedding or reranking model; the server in front imports it, so that no large library is here."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["embedding", "reranking"]
Cut = Literal["no", "end", "start"]  # What of a text that is too long is left out: nothing, so that it is refused.


@dataclass(frozen=True, slots=True)
class EmbedderCard:
    """What requests are checked against, and what people are told."""

    model_id: str
    kind: Kind
    architecture: str
    format: str
    dimensions: int  # Of a vector; a reranker has one number for each text.
    max_tokens: int  # Of a text, special tokens and, for a reranker, the query among them.
    vocab_size: int
    is_nested: bool = False  # The first numbers of a vector are a vector by themselves (Matryoshka).
    prompts: dict[str, str] = field(default_factory=dict)  # Texts that stand in front of others, by their purpose.
    default_prompt: str | None = None  # This one of them does where a request names none.
    notes: tuple[str, ...] = ()
