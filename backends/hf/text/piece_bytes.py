"""How much text a token of a tokenizer.json stands for at most, where that can be told from its parts."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models

from tightrope.backends.hf.text.encoders import state

COMPOSED = 3  # Bytes of text for one that NFC leaves, at most: three letters of Hangul, of three bytes each, are one.
CHARACTER = 4  # A character has at most so many bytes of UTF-8.
# These pre-tokenizers keep all bytes.
_KEEPING = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"})


def max_token_bytes(source: Tokenizer, texts: Iterable[str]) -> int | None:
    """Bytes of text that one token stands for, at most; None where any text may be left out, or be one token.

    texts: of pieces and added tokens, as the files have them.
    """
    shrinks = _shrinks(state(source.normalizer))
    if shrinks is None or not _keeps(state(source.pre_tokenizer)) or not _knows_all(source):
        return None
    return shrinks * max(CHARACTER, *(len(text.encode()) for text in texts))


def _shrinks(normalizer: Any) -> int | None:  # noqa: ANN401 - JSON
    """By how many times a normalizer shortens a text, at most; None: by any."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "Sequence":
        found = [_shrinks(part) for part in normalizer["normalizers"]]
        factor = 1
        for one in found:
            if one is None:
                return None
            factor *= one
        return factor
    if normalizer["type"] == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return 1 if pattern is not None and len(pattern.encode()) <= len(content.encode()) else None
    return COMPOSED if normalizer["type"] == "NFC" else 1 if normalizer["type"] in ("NFD", "ByteLevel") else None


def _keeps(pre_tokenizer: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether a pre-tokenizer leaves nothing out."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps, pre_tokenizer["pretokenizers"]))
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in _KEEPING


def _knows_all(source: Tokenizer) -> bool:
    """Whether every byte of a text has a token, rather than vanishing, or being one with other unknown ones."""
    model = source.model
    if not isinstance(model, models.BPE):
        return False
    if model.byte_fallback:
        return all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return "ByteLevel" in str(state(source.pre_tokenizer))
