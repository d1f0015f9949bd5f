"""Text to token ids and back by the vocabulary in the GGUF file."""

import ctypes
import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.named_tokens import bos_id, end_ids, named_ids
from tightrope.backends.gguf.native import NativeModel
from tightrope.backends.gguf.read_texts import ReadTexts
from tightrope.backends.gguf.special_tokens import SpecialToken, SpecialTokens
from tightrope.backends.plain_text import WORDS, MarkCutter, place_to_cut
from tightrope.backends.protocol import MAX_ADDED_TEXTS

_CONTROL = ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_UNKNOWN  # parse_special decides about these.
_SPACE_PREFIXED = (ll.LLAMA_VOCAB_TYPE_SPM, ll.LLAMA_VOCAB_TYPE_UGM)
_BRACKETED = re.compile(r"[<\[◁【]\S+[>\]▷】]")  # Marks are written so.
_SEPARATOR = b"\x01"  # No vocabulary joins this character with others.
_CHARACTER = 4  # A character has at most so many bytes, and one that is in no piece may be one unknown token.
_SHORT = 64  # The ids of a text of so few bytes are kept for when it comes again.
_MOST_KNOWN = 4096


class GGUFTokenizer:
    """Tokenizer over llama.cpp's vocabulary functions, which only read and so may be called from any thread."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model  # This keeps the vocabulary's memory alive.
        self._vocab: Any = model.vocab  # It is a native pointer.
        self.vocab_size = model.vocab_size
        named = named_ids(model)
        self.bos_id = bos_id(model, named)
        self.adds_bos = bool(ll.llama_vocab_get_add_bos(self._vocab)) and self.bos_id is not None
        ids = range(self.vocab_size)
        self.eos_ids = end_ids(model, named)
        self._special = frozenset(i for i in ids if self._attr(i) & _CONTROL)
        self._bytes: dict[int, bytes] = {}  # It is filled as tokens are seen.
        self._special_texts = tuple(map(self._text, sorted(self._special)))
        self._separator_ids = self._tokenize(_SEPARATOR, parse_special=False) if self._prefixes_space() else []
        self._added = self._added_tokens()
        self._marks: dict[bytes, int] = {}  # These added tokens are special all the same.
        self.named_tokens = tuple((name, self._text(token_id)) for name, token_id in named.items())
        # what ends a turn is no text, whatever its type
        self.set_marks([text for text, i in self._added.items() if i in self.eos_ids and not WORDS.fullmatch(text)], ())
        self.lost_bytes, self.max_token_bytes = self._measure()

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        """See Tokenizer. An unpaired surrogate, which has no UTF-8, becomes a replacement character."""
        token_ids: list[int] = []
        known: dict[tuple[bytes, bool], list[int]] = {}  # A chat has the same few words between its marks.
        is_prefixed = is_start
        for part in self._cut_out[parse_special].parts(_utf8(text)):
            if isinstance(part, int):
                token_ids.append(part)
                is_prefixed = True  # Llama.cpp puts the space of such a vocabulary behind every special token.
                continue
            key = part, is_prefixed
            found = known.get(key)
            if found is None:
                read = partial(self._encode_part, part, parse_special=parse_special, is_prefixed=is_prefixed)
                is_short = len(part) <= _SHORT
                found = read() if is_short else self._read_texts.token_ids(part, (parse_special, is_prefixed), read)
                if is_short and len(known) < _MOST_KNOWN:
                    known[key] = found
            token_ids += found
            is_prefixed = False
        return token_ids

    def _encode_part(self, part: bytes, *, parse_special: bool, is_prefixed: bool) -> list[int]:
        """Token ids of a text without special tokens; without parse_special it may still hold texts of some."""
        if parse_special or not self._cutter.cuts_any:
            return self._encode(part, parse_special=False, is_prefixed=is_prefixed)
        token_ids: list[int] = []
        for piece in self._cutter.pieces(part.decode(errors="surrogateescape")):
            raw = piece.encode(errors="surrogateescape")
            token_ids += self._encode(raw, parse_special=False, is_prefixed=is_prefixed and not token_ids)
        return token_ids

    def _encode(self, raw: bytes, *, parse_special: bool, is_prefixed: bool) -> list[int]:
        """llama.cpp's own token ids. is_prefixed: with the space that the vocabulary puts in front, if it does."""
        if is_prefixed or not self._separator_ids:
            return self._tokenize(raw, parse_special=parse_special)
        # the vocabulary would put a space in front: let it go in front of a separator, and cut both off
        token_ids = self._tokenize(_SEPARATOR + raw, parse_special=parse_special)
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
        self._marks |= {_utf8(text): token_id for text, token_id in found.items()}
        self._cut()

    def _cut(self) -> None:
        """Set what is cut out of texts, and what keeps plain text from being read as special tokens."""
        self._read_texts = ReadTexts()  # What was read before may be read otherwise now.
        tokens = {token.text: token for token in map(self._special_token, range(self.vocab_size)) if token is not None}
        plain = [token for token in tokens.values() if not self._attr(token.token_id) & _CONTROL]
        # They are found in any text or in none.
        marks = {text: SpecialToken(token_id, text) for text, token_id in self._marks.items()}
        self._cut_out = {
            True: SpecialTokens((marks | tokens).values(), self._precedes),
            False: SpecialTokens((token for token in plain if token.text not in marks), self._precedes),
        }

        def encode(text: str) -> list[int]:
            return self._encode(_utf8(text), parse_special=False, is_prefixed=False)

        texts = zip(self._special_texts, sorted(self._special), strict=True)
        places = {text: place_to_cut(text, token_id, encode) for text, token_id in texts}
        self._cutter = MarkCutter({text: place for text, place in places.items() if place is not None})

    def _measure(self) -> tuple[bytes, int | None]:
        """`lost_bytes` and `max_token_bytes`, see Tokenizer."""
        pieces = [self.token_bytes(i) for i in range(self.vocab_size)]
        kind = ll.llama_vocab_type(self._vocab)
        # the special tokens that take in the blanks beside them leave text out, and other vocabularies clean it
        if kind not in (ll.LLAMA_VOCAB_TYPE_SPM, ll.LLAMA_VOCAB_TYPE_BPE) or self._cut_out[True].strips_any:
            return b"", None
        known = {piece[0] for piece in pieces if len(piece) == 1}
        is_byte_level = kind == ll.LLAMA_VOCAB_TYPE_BPE  # Such a vocabulary leaves out what it has no token for.
        lost = bytes(byte for byte in range(256) if byte not in known) if is_byte_level else b""
        longest = max(len(piece.replace(b" ", "▁".encode())) for piece in pieces)  # A text may hold either.
        return lost, max(_CHARACTER, longest)

    def _special_token(self, token_id: int) -> SpecialToken | None:
        """A token that llama.cpp finds in texts by itself."""
        attr = self._attr(token_id)
        if not attr & (_CONTROL | ll.LLAMA_TOKEN_ATTR_USER_DEFINED):
            return None
        text: bytes = ll.llama_vocab_get_text(self._vocab, token_id)
        if self.token_bytes(token_id).startswith(text + b"\0"):
            text = self.token_bytes(token_id)  # It goes on behind the zero byte.
        return SpecialToken(
            token_id, text, bool(attr & ll.LLAMA_TOKEN_ATTR_LSTRIP), bool(attr & ll.LLAMA_TOKEN_ATTR_RSTRIP)
        )

    def _precedes(self, one: SpecialToken, other: SpecialToken, joined: bytes) -> bool | None:
        """Which of two texts of one length llama.cpp looks for first, as it shows where one goes into the other.

        It sorts them by length alone, and what becomes of equals is up to the library that it is built with.
        """
        token_ids = self._tokenize(joined, parse_special=True)
        finds_one, finds_other = token_ids[:1] == [one.token_id], token_ids[-1:] == [other.token_id]
        if one.strips_right and len(joined) == len(one.text) + len(other.text):
            return not finds_other
        return finds_one if finds_one or finds_other else None

    def _attr(self, token_id: int) -> int:
        return int(ll.llama_vocab_get_attr(self._vocab, token_id))

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
        return bool(self._attr(token_id) & ll.LLAMA_TOKEN_ATTR_USER_DEFINED)

    def _is_out_of_reach(self, token_id: int, text: str) -> bool:
        is_plain = self._attr(token_id) == ll.LLAMA_TOKEN_ATTR_NORMAL
        if not is_plain or _BRACKETED.fullmatch(text) is None:
            return False
        return self._encode(_utf8(text), parse_special=True, is_prefixed=False) != [token_id]

    def _text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def _prefixes_space(self) -> bool:
        """Whether the vocabulary puts a space in front of every text."""
        if ll.llama_vocab_type(self._vocab) not in _SPACE_PREFIXED:
            return False
        text = b"".join(map(self.token_bytes, self._tokenize(b"a", parse_special=False)))
        return text.startswith((b" ", "▁".encode()))  # A vocabulary without a piece for a blank gives "▁".

    def _tokenize(self, raw: bytes, *, parse_special: bool) -> list[int]:
        room = len(raw) + 8  # A token is a byte and more, mostly; the space in front may be one more.
        while True:
            out = (ctypes.c_int32 * room)()
            count = ll.llama_tokenize(self._vocab, raw, len(raw), out, room, False, parse_special)
            if count >= 0:
                return out[:count]
            room = -count  # A blank without a piece of its own takes three tokens.

    def _piece(self, token_id: int) -> bytes:
        size = 64
        while True:
            out = ctypes.create_string_buffer(size)
            count = ll.llama_token_to_piece(self._vocab, token_id, out, size, 0, True)
            if count >= 0:
                return out.raw[:count]
            size = -count


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")
