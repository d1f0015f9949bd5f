"""Checks a GGUF file's vocabulary for what llama.cpp ends the process over, at the start or at some later request."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
# arrays with an element for each token: key -> the types that they may have, by their names, as GGUF type ids
PER_TOKEN = {TOKENS: {"strings": 8}, TYPES: {"int32": 5, "uint32": 4}, "tokenizer.ggml.scores": {"float32": 6}}
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_BYTE = 6  # A token of this type stands for one byte.
_BLANK = "▁".encode()
_BERT_IDS = ("unknown", "cls", "seperator")  # The last one is spelt so in the format.
_SHOWN = 40  # A message shows so many bytes of a text.

Array = np.ndarray[Any, np.dtype[Any]]


class BadVocabulary(ValueError):
    """One line: the key, and what is wrong with its value."""


def check_vocabulary(
    texts: Sequence[bytes], arrays: Mapping[str, Array], metadata: Mapping[str, object]
) -> tuple[str, ...]:
    """What is odd about a vocabulary, one line each.

    texts: by token id. arrays: the others of PER_TOKEN that the file has. Raises BadVocabulary for what llama.cpp ends
    the process over.
    """
    if any(b"\0" in text for text in texts):  # Llama.cpp reads each up to there.
        texts = [text.partition(b"\0")[0] for text in texts]
    for key, array in arrays.items():
        if len(array) < len(texts):
            raise BadVocabulary(f"{key} has {len(array)} elements; it must have one for each of {len(texts)} tokens")
    _check_texts(texts)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "bert":
        _check_bert(len(texts), arrays.get(TYPES), metadata)
    notes = _check_sentencepiece(frozenset(texts)) if kind == "llama" else []
    if kind == "gpt2" and not metadata.get("tokenizer.ggml.pre"):
        notes.append(
            "vocabulary: the file lacks tokenizer.ggml.pre, so texts may be cut into other tokens than in training; "
            "get one that was converted after April 2024"
        )
    if not any(key in metadata for key in _ENDS):
        notes.append(
            f"vocabulary: the file names no end token ({_ENDS[0]}), so answers end on the marks of its template alone"
        )
    return tuple(notes)


def _check_texts(texts: Sequence[bytes]) -> None:
    try:
        b"\n".join(texts).decode()  # An incomplete character does not swallow the newline behind it.
    except UnicodeDecodeError:
        place, text = next((i, text) for i, text in enumerate(texts) if not _is_utf8(text))
        raise BadVocabulary(f"{TOKENS}: the text of token {place}, {text[:_SHOWN]!r}, is not UTF-8") from None
    filled = [text for text in texts if text]  # Llama.cpp names the empty ones by their ids.
    if len(set(filled)) == len(filled):
        return
    first: dict[bytes, int] = {}
    for place, text in enumerate(texts):
        if text and first.setdefault(text, place) != place:
            shown = text.decode()[:_SHOWN]
            raise BadVocabulary(f"{TOKENS}: tokens {first[text]} and {place} have the same text, {shown!r}")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_bert(num_tokens: int, types: Array | None, metadata: Mapping[str, object]) -> None:
    for name in _BERT_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = metadata.get(key)
        if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
            has = "is missing" if token_id is None else f"is {token_id!r}"
            raise BadVocabulary(
                f"{key} {has}; a vocabulary of kind 'bert' needs one of its {num_tokens} token ids there"
            )
    if types is not None and _BYTE in types:
        raise BadVocabulary(f"{TYPES} has byte tokens, which a vocabulary of kind 'bert' can't have")


def _check_sentencepiece(texts: frozenset[bytes]) -> list[str]:
    missing = [byte for byte in range(256) if not texts & {b"<0x%02X>" % byte, bytes([byte])}]
    if missing:
        raise BadVocabulary(
            f"{TOKENS}: {len(missing)} of the 256 byte tokens are missing, <0x{missing[0]:02X}> first; without them "
            "llama.cpp ends the process at a character that the vocabulary lacks"
        )
    if _BLANK in texts:
        return []
    return ["vocabulary: it has no piece for a blank; each blank becomes three byte tokens"]
