"""The table of characters in a sentencepiece file: longest texts that it holds are replaced, from left to right.

The tokenizers library has a normalizer for it that looks at clusters of letter and marks as a whole, and loses marks of
clusters that begin with a text of the table. The bytes are the length of a trie, the trie as a double array of words of
32 bits, and the replacements, each ended by a zero. Source: normalizer.cc of google/sentencepiece, darts.h of
s-yata/darts-clone.
"""

import re
import struct
from functools import lru_cache

_PRINTABLE = range(0x20, 0x7F)


class Charsmap:
    """Replaces texts; safe to call from any thread."""

    def __init__(self, raw: bytes) -> None:
        """Raises ValueError or struct.error when the bytes are no such table."""
        (size,) = struct.unpack_from("<I", raw)
        if size % 4 or size > len(raw) - 4 or not size:
            raise ValueError("truncated")
        self._units = struct.unpack_from(f"<{size // 4}I", raw, 4)
        self._texts = raw[4 + size :]
        # A printable character of ASCII matters where something else follows it, in most tables.
        plain = any(self._longest(bytes([one, other])) for one in _PRINTABLE for other in _PRINTABLE)
        self._places = re.compile(r".+" if plain else r"[ -~]?[^ -~]+", re.DOTALL)
        self._replaced = lru_cache(maxsize=4096)(self._replace)

    def replace(self, text: str) -> str:
        """The text as the table has it."""
        return self._places.sub(lambda match: self._replaced(match[0]), text)

    def _replace(self, text: str) -> str:
        raw, out, at = text.encode(), bytearray(), 0
        while at < len(raw):
            found = self._longest(raw[at : at + 64])
            if found is None:
                end = at + 1
                while end < len(raw) and raw[end] & 0xC0 == 0x80:
                    end += 1
                out += raw[at:end]
                at = end
            else:
                length, start = found
                end = self._texts.find(0, start)
                out += self._texts[start : end if end >= 0 else None]
                at += length
        return out.decode("utf-8", errors="replace")

    def _longest(self, raw: bytes) -> tuple[int, int] | None:
        """Length of the longest text of the table that `raw` begins with, and where its replacement starts."""
        units, found = self._units, None
        place = _offset(units[0])
        for i, byte in enumerate(raw):
            place ^= byte
            if place >= len(units) or units[place] & 0x800000FF != byte:
                break
            unit = units[place]
            place ^= _offset(unit)
            if unit >> 8 & 1 and place < len(units):
                found = i + 1, units[place] & 0x7FFFFFFF
        return found


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
