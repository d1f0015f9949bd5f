"""Whose tokens a request with an adapter is made of, where the adapter has an embedding of its own."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.files.opened import read_bytes
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.hf.text.vocabulary import MAX_FILE, has_tokenizer
from tightrope.backends.protocol import Tokenizer

_FILES = (
    *("tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)


def tokenizer_at(folder: Path, num_tokens: int, base: Path, shape: ModelShape, theirs: Tokenizer) -> Tokenizer | None:
    """The tokenizer of an adapter's folder, for `num_tokens`; None where `theirs`, of the model in `base`, is the same.

    Every end of a turn there is one here. Raises BackendError for a tokenizer that doesn't fit the adapter.
    """
    if has_tokenizer(folder) and any(_content(folder / name) != _content(base / name) for name in _FILES):
        own = HFTokenizer(folder, replace(shape, vocab_size=num_tokens))
        own.eos_ids |= theirs.eos_ids
        return own
    return None if num_tokens == theirs.vocab_size else OtherSize(theirs, num_tokens)


def _content(path: Path) -> bytes | None:
    return read_bytes(path, MAX_FILE) if path.exists() else None


class OtherSize:
    """A tokenizer for an embedding of another size. Tokens beyond those that it knows have no text."""

    def __init__(self, inner: Tokenizer, vocab_size: int) -> None:
        self._inner, self.vocab_size = inner, vocab_size
        self.bos_id, self.adds_bos, self.eos_ids = inner.bos_id, inner.adds_bos, inner.eos_ids
        self.lost_bytes, self.max_token_bytes = inner.lost_bytes, inner.max_token_bytes

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        """See Tokenizer."""
        return self._inner.encode(text, parse_special=parse_special, is_start=is_start)

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return self._inner.token_bytes(token_id) if token_id < self._inner.vocab_size else b""

    def is_special(self, token_id: int) -> bool:
        """See Tokenizer."""
        return self._inner.is_special(token_id)

    def special_texts(self) -> Sequence[str]:
        """See Tokenizer."""
        return self._inner.special_texts()

    def added_texts(self) -> Sequence[str]:
        """See Tokenizer."""
        return self._inner.added_texts()

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        """See Tokenizer. The model's own has been told of them."""
        self.eos_ids = self._inner.eos_ids
