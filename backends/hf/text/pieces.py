"""What a vocabulary's pieces are in bytes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.text.encoders import state

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

PieceReader = Callable[[str], bytes]


def piece_reader(source: Tokenizer, path: Path) -> PieceReader:
    """How the pieces are turned into bytes. Raises BackendError for a decoder that is not served."""
    decoder = _kinds(state(source.decoder))
    if "ByteLevel" in decoder | _kinds(state(source.pre_tokenizer)):
        return byte_level
    if "ByteFallback" in decoder:
        return _byte_fallback
    if decoder & {"Metaspace", "Replace"}:
        return _spaced
    kinds = " and ".join(sorted(decoder)) or "missing"
    raise BackendError(f"{path}: its decoder is {kinds}; byte-level and sentencepiece ones are served")


def _kinds(part: Any) -> set[str]:  # noqa: ANN401 - JSON
    """The types of a part of the tokenizer and of all parts inside it."""
    if not isinstance(part, dict):
        return set()
    inner = [p for key in ("decoders", "pretokenizers") for p in part.get(key, [])]
    return {part["type"]}.union(*map(_kinds, inner))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones stand for themselves, the rest for 256 and the following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def byte_level(piece: str) -> bytes:
    """The bytes of a byte-level piece; of one that is not written in that alphabet, its text's."""
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()


def _byte_fallback(piece: str) -> bytes:
    match = BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else _spaced(piece)


def _spaced(piece: str) -> bytes:
    return piece.replace("▁", " ").encode()
