"""Text to token ids and back by the vocabulary in the GGUF file."""

import ctypes
import re
from collections.abc import Collection, Sequence
from typing import Any

from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.named_tokens import bos_id, end_ids, named_ids
from tightrope.backends.gguf.native import NativeModel
from tightrope.backends.plain_text import MarkCutter, place_to_cut
from tightrope.backends.protocol import MAX_ADDED_TEXTS

_CONTROL = ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_UNKNOWN  # what parse_special decides about
_SPACE_PREFIXED = (ll.LLAMA_VOCAB_TYPE_SPM, ll.LLAMA_VOCAB_TYPE_UGM)
_BRACKETED = re.compile(r"[<\[◁【]\S+[>\]▷】]")  # as marks are written
_SEPARATOR = "\x01"  # a character that no vocabulary joins with others


class GGUFTokenizer:
    """Tokenizer over llama.cpp's vocabulary functions, which only read and so may be called from any thread."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model  # keeps the vocabulary's memory alive
        self._vocab: Any = model.vocab  # a native pointer
        self.vocab_size = model.vocab_size
        named = named_ids(model)
        self.bos_id = bos_id(model, named)
        self.adds_bos = bool(ll.llama_vocab_get_add_bos(self._vocab)) and self.bos_id is not None
        ids = range(self.vocab_size)
        self.eos_ids = end_ids(model, named)
        self._special = frozenset(i for i in ids if ll.llama_vocab_get_attr(self._vocab, i) & _CONTROL)
        self._bytes: dict[int, bytes] = {}  # filled as tokens are seen
        self._special_texts = tuple(map(self._text, sorted(self._special)))
        self._separator_ids = self._tokenize(_SEPARATOR, parse_special=False) if self._prefixes_space() else []
        self._added = self._added_tokens()
        self._unseen: re.Pattern[str] | None = None  # marks that llama.cpp doesn't find even where it parses them
        self.named_tokens = tuple((name, self._text(token_id)) for name, token_id in named.items())
        self._cutter = self._make_cutter()

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        """See Tokenizer. An unpaired surrogate, which has no UTF-8, becomes a replacement character."""
        if not text:
            return []
        if parse_special:
            return self._encode_parsed(text, is_start=is_start)
        token_ids: list[int] = []
        for piece in self._cutter.pieces(text):  # llama.cpp finds user-defined tokens in any text
            token_ids += self._encode(piece, parse_special=False, is_start=is_start and not token_ids)
        return token_ids

    def _encode_parsed(self, text: str, *, is_start: bool) -> list[int]:
        if self._unseen is None:
            return self._encode(text, parse_special=True, is_start=is_start)
        token_ids: list[int] = []
        for index, piece in enumerate(self._unseen.split(text)):
            if index % 2:
                token_ids.append(self._added[piece])
            elif piece:  # behind a mark stands the space that llama.cpp puts behind every other special token
                token_ids += self._encode(piece, parse_special=True, is_start=is_start or index > 0)
        return token_ids

    def _encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        if is_start or not self._separator_ids:
            return self._tokenize(text, parse_special=parse_special)
        # the vocabulary would put a space in front: let it go in front of a separator, and cut both off
        token_ids = self._tokenize(_SEPARATOR + text, parse_special=parse_special)
        return token_ids[len(self._separator_ids) :]

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._piece(token_id)
        return known

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_texts(self) -> Sequence[str]:
        """Control and unknown tokens, and marks. Other user-defined tokens, such as runs of spaces, are plain text."""
        return self._special_texts

    def added_texts(self) -> Sequence[str]:
        """See Tokenizer. User-defined tokens, and those that text in brackets should be but never becomes."""
        return [text for text, token_id in self._added.items() if token_id not in self._special]

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        """See Tokenizer."""
        found = {text: self._added[text] for text in marks if text in self._added}
        known = found | dict(zip(self._special_texts, sorted(self._special), strict=True))
        self._special |= set(found.values())
        self._special_texts = tuple(map(self._text, sorted(self._special)))
        self.eos_ids |= {known[text] for text in ends if text in known}
        self._cutter = self._make_cutter()
        unseen = sorted((text for text, i in found.items() if not self._is_user_defined(i)), key=len, reverse=True)
        self._unseen = re.compile(f"({'|'.join(map(re.escape, unseen))})") if unseen else None

    def _make_cutter(self) -> MarkCutter:
        """What keeps plain text from being read as special tokens."""

        def encode(text: str) -> list[int]:
            return self._encode(text, parse_special=False, is_start=False)

        texts = zip(self._special_texts, sorted(self._special), strict=True)
        places = {text: place_to_cut(text, token_id, encode) for text, token_id in texts}
        return MarkCutter({text: place for text, place in places.items() if place is not None})

    def _added_tokens(self) -> dict[str, int]:
        """Ids of tokens that could be marks, by their texts: user-defined ones, and plain ones that no text becomes.

        The second kind is in files of older converters, which had user-defined pieces for plain ones.
        """
        found: dict[str, int] = {}
        for token_id in range(self.vocab_size):
            text = self._text(token_id)
            may_be_mark = self._is_user_defined(token_id) or self._is_out_of_reach(token_id, text)
            if may_be_mark and text.strip() and len(found) < MAX_ADDED_TEXTS:
                found.setdefault(text, token_id)
        return found

    def _is_user_defined(self, token_id: int) -> bool:
        return bool(ll.llama_vocab_get_attr(self._vocab, token_id) & ll.LLAMA_TOKEN_ATTR_USER_DEFINED)

    def _is_out_of_reach(self, token_id: int, text: str) -> bool:
        is_plain = ll.llama_vocab_get_attr(self._vocab, token_id) == ll.LLAMA_TOKEN_ATTR_NORMAL
        if not is_plain or _BRACKETED.fullmatch(text) is None:
            return False
        return self._encode(text, parse_special=True, is_start=False) != [token_id]

    def _text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def _prefixes_space(self) -> bool:
        """Whether the vocabulary puts a space in front of every text."""
        if ll.llama_vocab_type(self._vocab) not in _SPACE_PREFIXED:
            return False
        text = b"".join(map(self.token_bytes, self._tokenize("a", parse_special=False)))
        return text.startswith((b" ", "▁".encode()))  # the latter where the vocabulary has no piece for a blank

    def _tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", errors="replace")
        room = len(raw) + 8  # a token is a byte and more, mostly; the space in front may be one more
        while True:
            out = (ctypes.c_int32 * room)()
            count = ll.llama_tokenize(self._vocab, raw, len(raw), out, room, False, parse_special)
            if count >= 0:
                return out[:count]
            room = -count  # a blank without a piece of its own takes three tokens

    def _piece(self, token_id: int) -> bytes:
        size = 64
        while True:
            out = ctypes.create_string_buffer(size)
            count = ll.llama_token_to_piece(self._vocab, token_id, out, size, 0, True)
            if count >= 0:
                return out.raw[:count]
            size = -count
