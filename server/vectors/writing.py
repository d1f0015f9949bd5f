"""Vectors as JSON: lists of numbers, written in slices between which others are answered, or base64."""

from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, Field

from tightrope.backends.embedding.card import EmbedderCard
from tightrope.engine.embedding.protocol import Vectors
from tightrope.server.http.long_lists import json_answer, json_list

Encoding = Literal["float", "base64"]
NUMBERS = 20_000  # So many take some milliseconds to write.


class EmbeddingItem(BaseModel):
    object: str
    index: int
    embedding: list[float] | str = Field(description="base64: float32, little-endian.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """OpenAI's answer, and KoboldCpp's."""

    object: str
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


async def number_lists(vectors: Vectors) -> bytes:
    """[[...], ...]."""
    return await json_list((vectors.floats(place) for place in range(len(vectors.rows))), slice_size(vectors))


async def openai_list(card: EmbedderCard, vectors: Vectors, encoding: Encoding) -> Response:
    """As EmbeddingList has it."""

    def items() -> Iterator[dict[str, Any]]:
        for place, row in enumerate(vectors.rows):
            embedding = b64encode(row).decode() if encoding == "base64" else vectors.floats(place)
            yield {"object": "embedding", "index": place, "embedding": embedding}

    used = sum(vectors.num_tokens)
    data = await json_list(items(), slice_size(vectors))
    usage = {"prompt_tokens": used, "total_tokens": used}
    return json_answer({"object": "list", "data": data, "model": card.model_id, "usage": usage})


def slice_size(vectors: Vectors) -> int:
    """So many vectors are written at a time."""
    return max(1, 4 * NUMBERS // max(4, len(vectors.rows[0])))
