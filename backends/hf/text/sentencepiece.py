"""A sentencepiece model file as a tokenizer of the tokenizers library, for folders without tokenizer.json.

The file is a protocol buffer: pieces (1), each with text (1), score (2) and type (3); the trainer's settings (2), of
which the algorithm (3), byte fallback (35) and the ids of the unknown piece (40), BOS (41) and EOS (42) matter; the
normalizer's settings (3): a table of characters (2), a space put in front (3), runs of spaces made one (4). Source:
sentencepiece_model.proto of google/sentencepiece.

sentencepiece puts the space in front of the whole text, whatever it starts with, and never joins a user-defined piece
with what stands around it, whether the piece is found in the text or in the text with its spaces made ▁. Here such
pieces are added tokens that are looked for in the normalized text, and the space is asked for by a mark in front of
the text: a normalizer that puts it there would also put it in front of the pieces that are looked for.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from tightrope.backends.errors import BackendError
from tightrope.backends.files.opened import read_bytes
from tightrope.backends.hf.text.charsmap import Charsmap

MAX_FILE = 256 << 20  # In bytes. Vocabularies of 256,000 pieces take about 5 MB.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM, BPE = 1, 2
NEVER = -1e9  # A piece of this score is not found in text.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")  # Lines of other vocabularies: base 64, a rank.
PREFIX, NO_PREFIX = "\U0010ffff", "\U0010fffe"  # In front of a part of a text: a space goes here, or not.

_Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What the file says, as far as it matters for tokenizing."""

    pieces: Sequence[Piece]
    algorithm: int
    byte_fallback: bool
    unknown_id: int
    bos_id: int  # It is -1 where there is none.
    eos_id: int
    charsmap: Charsmap | None
    prefixes_space: bool
    joins_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """A sentencepiece BPE or unigram model. Raises BackendError when the file is none."""
    raw = read_bytes(path, MAX_FILE)
    if _TIKTOKEN.match(raw):
        raise BackendError(
            f"{path}: a vocabulary of tiktoken, as Meta's own layout of Llama 3 has it; add the model's tokenizer.json"
        )
    try:
        model = parse(raw)
    except (ValueError, TypeError, IndexError, struct.error):
        raise BackendError(
            f"{path}: not a sentencepiece model; copy it again, or add the model's tokenizer.json"
        ) from None
    if model.algorithm not in (UNIGRAM, BPE):
        raise BackendError(f"{path}: sentencepiece algorithm {model.algorithm} is not served; unigram and BPE are")
    size = len(model.pieces)
    if len({piece.text for piece in model.pieces}) != size or not 0 <= model.unknown_id < size:
        raise BackendError(f"{path}: its pieces are not unique, or it has no unknown piece; copy it again")
    return model


def parse(raw: bytes) -> SentencePieceModel:
    """Raises ValueError, TypeError, IndexError or struct.error when the bytes are no such message."""
    pieces = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    return SentencePieceModel(
        pieces,
        algorithm=_number(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        unknown_id=_signed(_number(trainer.get(40, 0))),
        bos_id=_signed(_number(trainer.get(41, 1))),
        eos_id=_signed(_number(trainer.get(42, 2))),
        charsmap=Charsmap(charsmap) if (charsmap := _message(normalizer.get(2, b""))) else None,
        prefixes_space=bool(normalizer.get(3, 1)),
        joins_spaces=bool(normalizer.get(4, 1)),
    )


def build(model: SentencePieceModel) -> Tokenizer:
    """The tokenizer without its added tokens, for which see `added`. Pieces keep their ids."""
    pieces = model.pieces
    if model.algorithm == BPE:
        algorithm: models.Model = models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[model.unknown_id].text,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    else:
        scores = [(p.text, p.score if p.type == NORMAL else NEVER) for p in pieces]
        algorithm = models.Unigram(scores, model.unknown_id, model.byte_fallback)
    tokenizer = Tokenizer(algorithm)
    tokenizer.normalizer = _normalizer(model)
    fallback = [decoders.ByteFallback()] if model.byte_fallback else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback, decoders.Fuse()])
    return tokenizer


def added(model: SentencePieceModel) -> dict[int, AddedToken]:
    """Control pieces as special tokens, user-defined ones as tokens that are always found, by their ids."""
    return {
        i: AddedToken(piece.text, normalized=piece.type == USER_DEFINED, special=piece.type != USER_DEFINED)
        for i, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    }


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    """Spaces as sentencepiece has them, in a part of a text between added tokens, in front of which may be PREFIX.

    The table of characters is not among the steps: user-defined pieces are found before it is used.
    """
    steps: list[normalizers.Normalizer] = []
    if model.joins_spaces:
        steps += [
            normalizers.Replace(Regex(rf"(?<=\A[{PREFIX}{NO_PREFIX}]) +|\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(rf"\A{PREFIX}\z"), ""),  # An empty text gets no space.
        ]
    steps += [
        normalizers.Replace(" ", "▁"),
        normalizers.Replace(Regex(rf"\A{PREFIX}"), "▁"),
        normalizers.Replace(Regex(rf"\A{NO_PREFIX}"), ""),
    ]
    return normalizers.Sequence(steps)


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the joins that sentencepiece prefers (of higher score) first."""
    joinable = {p.text for p in pieces if p.type == NORMAL}
    ranked = sorted((p for p in pieces if p.text in joinable), key=lambda p: -p.score)  # Sorting is stable: then by id.
    return [
        (p.text[:cut], p.text[cut:])
        for p in ranked
        for cut in range(1, len(p.text))
        if p.text[:cut] in joinable and p.text[cut:] in joinable
    ]


def _piece(value: int | bytes) -> Piece:
    fields = dict(_fields(_message(value)))
    (score,) = struct.unpack("<f", _message(fields.get(2, bytes(4))))
    return Piece(_message(fields[1]).decode("utf-8") if 1 in fields else "", score, _number(fields.get(3, NORMAL)))


def _fields(raw: bytes) -> Iterator[_Field]:
    """Field numbers and values of a message: whole numbers for varints, bytes for everything else."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(raw, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if size > len(raw) - at:
            raise ValueError("truncated")
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    """A varint as the signed number of 32 bits that it stands for."""
    return (value & 0xFFFFFFFF) - (1 << 32) if value & (1 << 31) else value


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number in place of a message")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("a message in place of a number")
    return value
