"""One message's texts: cut into tokens, run, cut to size and scaled."""

from collections.abc import Sequence

import numpy as np

from tightrope.backends.embedding.protocol import Embedder, Rows, Tokens, TooLong
from tightrope.engine.errors import BackendFailed, ContextLengthExceeded, InvalidRequest
from tightrope.engine.process.wire import Embed, Embedded

FULL_SCALE = 32760.0  # The norm 0 brings the largest number of a vector to this, for those that store 16 bits.


def embedded(message: Embed, embedder: Embedder, threads: int) -> Embedded:
    """The answer.

    Raises InvalidRequest for a text that the model doesn't take, BackendFailed for numbers that are none, and whatever
    a backend raises besides.
    """
    texts = [_tokens(message, embedder, place) for place in range(len(message.texts))]
    rows = embedder.run(texts, threads)
    if not np.isfinite(rows).all():
        raise BackendFailed("the embedding model gave numbers that are none; its file may be damaged")
    if message.query is None:
        rows = scaled(rows[:, : message.dimensions], message.norm)
    return Embedded(message.call_id, rows.astype("<f4").tobytes(), tuple(len(text.ids) for text in texts))


def _tokens(message: Embed, embedder: Embedder, place: int) -> Tokens:
    text, number, card = message.texts[place], message.first + place, embedder.card
    try:
        if isinstance(text, str):
            made = embedder.encode(text, message.query, message.cut)
        else:
            made = Tokens(_checked_ids(text, card.vocab_size, number))
            if len(made.ids) > card.max_tokens:
                if message.cut == "no":
                    raise TooLong(len(made.ids), card.max_tokens)
                ids = text[-card.max_tokens :] if message.cut == "start" else text[: card.max_tokens]
                made = Tokens(ids)
    except TooLong as error:
        raise ContextLengthExceeded(error.num_tokens, 0, error.max_tokens, f"input[{number}]") from None
    if not made.ids:
        raise InvalidRequest(f"text {number} has no tokens", f"input[{number}]")
    return made


def _checked_ids(ids: Sequence[int], vocab_size: int, number: int) -> Sequence[int]:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InvalidRequest(
            f"text {number} has token ids from {min(ids)} to {max(ids)}; the model knows 0 to {vocab_size - 1}",
            f"input[{number}]",
        )
    return ids


def scaled(rows: Rows, norm: int) -> Rows:
    """Rows of length 1 by a norm: 2 is Euclid's, 1 the sum, p in general; 0 by the largest number; -1 as they are.

    A row of zeros stays one. Source: embd_normalize of llama.cpp's server.
    """
    if norm < 0:
        return rows
    exact = np.abs(rows.astype(np.float64))
    if norm == 0:
        lengths = exact.max(1, keepdims=True) / FULL_SCALE
    else:
        most = np.maximum(exact.max(1, keepdims=True), 1e-300)  # Powers of what is at most 1 don't overflow.
        lengths = most * ((exact / most) ** norm).sum(1, keepdims=True) ** (1 / norm)
    made = np.divide(rows.astype(np.float64), lengths, out=np.zeros(rows.shape), where=lengths > 0)
    scaled_rows: Rows = made.astype(np.float32)
    return scaled_rows
