"""Text to token ids and back by a Hugging Face folder's tokenizer.json or tokenizer.model."""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.config import ModelShape
from tightrope.backends.hf.generation import TURN_ENDS, end_ids, named_token, read_optional
from tightrope.backends.hf.spm import read_sentencepiece
from tightrope.backends.opened import read_bytes
from tightrope.backends.protocol import MAX_ADDED_TEXTS

MAX_FILE = 512 << 20  # bytes; vocabularies of 256,000 pieces take about 35 MB
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFTokenizer:
    """Tokenizer over the tokenizers library, whose objects don't change after the start, so that threads share them.

    Two switches need objects of their own, which share one vocabulary: whether special tokens are recognised, and
    whether the text gets the space that a sentencepiece vocabulary puts in front of a prompt.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Raises BackendError when the folder has no tokenizer, a malformed one, or one with ids outside the model."""
        source, self._path = _read(folder)
        self.vocab_size = shape.vocab_size
        self._source = source
        self._added = source.get_added_tokens_decoder()
        self._check_ids(source)
        self._build()
        self._bytes = _piece_reader(source, self._path)
        self.bos_id, self.adds_bos = self._bos(folder, source, shape)
        named_end = named_token(folder, "eos_token")
        ends = {self._whole.token_to_id(text) for text in TURN_ENDS & set(self._special_texts)}
        if named_end is not None:
            ends.add(self._whole.token_to_id(named_end))
        self.eos_ids: frozenset[int] = end_ids(folder, shape) | {i for i in ends if i is not None}

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        """See Tokenizer. An unpaired surrogate, which has no UTF-8, becomes a question mark."""
        if not text:
            return []
        if not text.isascii():
            text = text.encode("utf-8", errors="replace").decode("utf-8")
        encoder = self._encoders[is_start, parse_special]
        # the fast call leaves offsets out, and releases the interpreter's lock like the other
        token_ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return token_ids

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer. An id that the model has and the vocabulary lacks adds nothing."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read_token(token_id)
        return known

    def _build(self) -> None:
        """Make the encoders, and list what is special by the flags of the added tokens."""
        self._encoders = {
            (is_start, parse_special): _variant(
                self._source, self._added, self._path, prefixed=is_start, parse_special=parse_special
            )
            for is_start in (True, False)
            for parse_special in (True, False)
        }
        self._whole = self._encoders[True, True]
        self._special = frozenset(i for i, token in self._added.items() if token.special)
        self._special_texts = tuple(self._added[i].content for i in sorted(self._special))
        self._known: dict[int, bytes] = {}  # filled as tokens are seen

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_texts(self) -> Sequence[str]:
        """Special tokens. Others that were added, such as runs of spaces, are plain text and always found."""
        return self._special_texts

    def added_texts(self) -> Sequence[str]:
        """See Tokenizer."""
        found = (token.content for _, token in sorted(self._added.items()) if not token.special)
        texts = [text for text in found if text.strip() and not _BYTE_PIECE.fullmatch(text)]
        return texts[:MAX_ADDED_TEXTS]

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        """See Tokenizer."""
        wanted = set(marks).intersection(self.added_texts())
        for token_id, token in self._added.items():
            if token.content in wanted:
                token.special = True
                self._added[token_id] = token
        self._build()
        self.eos_ids |= {i for i in self._special if self._added[i].content in set(ends)}

    def _read_token(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        added = self._added.get(token_id)
        if added is not None and added.special:
            return added.content.encode()
        piece = self._whole.id_to_token(token_id)
        return b"" if piece is None else self._bytes(piece)

    def _check_ids(self, source: Tokenizer) -> None:
        vocab = source.get_vocab(with_added_tokens=True)
        if not vocab:
            raise BackendError(f"{self._path}: its vocabulary is empty")
        text, last = max(vocab.items(), key=lambda item: item[1])
        if last >= self.vocab_size:
            raise BackendError(
                f"{self._path}: token {text!r} has id {last}, but vocab_size in config.json is {self.vocab_size}; "
                "tokenizer and model must belong together"
            )

    def _bos(self, folder: Path, source: Tokenizer, shape: ModelShape) -> tuple[int | None, bool]:
        """BOS and whether prompts start with it: as tokenizer_config.json says, or else as the post-processor does."""
        named = named_token(folder, "bos_token")
        bos = None if named is None else source.token_to_id(named)
        if bos is None:
            given = shape.raw.get("bos_token_id")
            bos = given if type(given) is int and 0 <= given < self.vocab_size else None
        first = source.encode("a").ids[:1]
        added = first != source.encode("a", add_special_tokens=False).ids[:1] and first[0] in self._special
        wish = read_optional(folder / "tokenizer_config.json").get("add_bos_token")
        if added and wish is not False:
            return first[0], True
        if isinstance(wish, bool):
            return bos, wish and bos is not None
        return bos, bos is not None and self._path.name == "tokenizer.model"  # a llama's, from before the setting


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's file, right or not."""
    return any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model"))


def _read(folder: Path) -> tuple[Tokenizer, Path]:
    """The folder's tokenizer and the file it came from."""
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        return _read_json(path), path
    path = folder / "tokenizer.model"
    if not os.path.lexists(path):
        raise BackendError(
            f"{folder}: holds neither tokenizer.json nor tokenizer.model; copy the model's tokenizer too"
        )
    tokenizer = read_sentencepiece(path)
    tokenizer.add_tokens(_later_tokens(folder, tokenizer))
    return tokenizer, path


def _read_json(path: Path) -> Tokenizer:
    raw = read_bytes(path, MAX_FILE)
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises plain Exception for all that can be wrong with a file
        raise BackendError(
            f"{path}: not a tokenizer of the tokenizers library: {' '.join(str(error).split()):.200}"
        ) from None
    tokenizer.no_padding()  # settings of the training run
    tokenizer.no_truncation()
    return tokenizer


def _later_tokens(folder: Path, tokenizer: Tokenizer) -> list[AddedToken]:
    """Tokens that were added to a sentencepiece vocabulary later, in the order of their ids."""
    path = folder / "tokenizer_config.json"
    listed = read_optional(path).get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise BackendError(f"{path}: added_tokens_decoder is {listed!r:.80}; it must map ids to tokens")
    tokens: dict[int, AddedToken] = {}
    for key, value in listed.items():
        if not key.isdecimal() or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise BackendError(
                f"{path}: added_tokens_decoder of {key!r:.40} must be an object with content, under an id"
            )
        flags = {name: value.get(name) is True for name in ("single_word", "lstrip", "rstrip", "special")}
        tokens[int(key)] = AddedToken(value["content"], normalized=False, **flags)
    path = folder / "added_tokens.json"
    for content, token_id in read_optional(path).items():
        if type(token_id) is not int:
            raise BackendError(f"{path}: the id of {content!r:.40} is {token_id!r:.40}; it must be a whole number")
        tokens.setdefault(token_id, AddedToken(content, normalized=False, special=False))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    new = {i: token for i, token in tokens.items() if tokenizer.id_to_token(i) != token.content}
    if sorted(new) != list(range(size, size + len(new))):
        raise BackendError(
            f"{path}: added tokens have ids {sorted(new)!s:.80}; they must follow the {size} of tokenizer.model"
        )
    return [tokens[i] for i in sorted(tokens)]


def _variant(
    source: Tokenizer, added: Mapping[int, AddedToken], path: Path, *, prefixed: bool, parse_special: bool
) -> Tokenizer:
    """A tokenizer over the same vocabulary that recognises special tokens, and puts a space in front, or doesn't."""
    tokenizer = Tokenizer(source.model)
    if prefixed:
        tokenizer.normalizer, tokenizer.pre_tokenizer = source.normalizer, source.pre_tokenizer
    else:
        # only a whole tokenizer can be made of JSON
        parts = {"normalizer": _state(source.normalizer), "pre_tokenizer": _state(source.pre_tokenizer)}
        empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        bare = Tokenizer.from_str(json.dumps(empty | {name: _without_prefix(part) for name, part in parts.items()}))
        tokenizer.normalizer, tokenizer.pre_tokenizer = bare.normalizer, bare.pre_tokenizer
    tokenizer.add_tokens([added[i] for i in sorted(added)])
    if tokenizer.get_added_tokens_decoder().keys() != added.keys():
        raise BackendError(f"{path}: ids of added_tokens are not the ones that follow its vocabulary")
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


def _state(part: Any) -> Any:  # noqa: ANN401 - any part of a tokenizer, and its JSON
    return None if part is None else json.loads(part.__getstate__())


def _without_prefix(part: Any) -> Any:  # noqa: ANN401 - JSON
    """A normaliser or pre-tokenizer without what puts a space in front of the text."""
    if not isinstance(part, dict):
        return part
    lists = {key: [_without_prefix(p) for p in part[key]] for key in ("normalizers", "pretokenizers") if key in part}
    for key, steps in lists.items():
        lists[key] = [step for step in steps if step is not None]
    kind = part["type"]
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part | lists


def _kinds(part: Any) -> set[str]:  # noqa: ANN401 - JSON
    """The types of a part of the tokenizer and of all parts inside it."""
    if not isinstance(part, dict):
        return set()
    inner = [p for key in ("decoders", "pretokenizers") for p in part.get(key, [])]
    return {part["type"]}.union(*map(_kinds, inner))


def _piece_reader(source: Tokenizer, path: Path) -> Callable[[str], bytes]:
    """How a vocabulary's pieces are turned into bytes."""
    decoder = _kinds(_state(source.decoder))
    if "ByteLevel" in decoder | _kinds(_state(source.pre_tokenizer)):
        return _byte_level
    if "ByteFallback" in decoder:
        return _byte_fallback
    if decoder & {"Metaspace", "Replace"}:
        return _spaced
    kinds = " and ".join(sorted(decoder)) or "missing"
    raise BackendError(f"{path}: its decoder is {kinds}; byte-level and sentencepiece ones are served")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones stand for themselves, the rest for 256 and the following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:  # a token that was added as plain text
        return piece.encode()


def _byte_fallback(piece: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else _spaced(piece)


def _spaced(piece: str) -> bytes:
    return piece.replace("▁", " ").encode()
