"""How many times longer a tokenizer.json's normalizer can make a text: a few small ones could fill any memory."""

import base64
import binascii
from typing import Any

MOST_REPLACED = 64  # A replacement lengthens a text by at most this factor; a space made ▁ is 3.
MOST_MAPPED = 256  # A table of characters gives at most so many bytes for one text; sentencepiece's longest is 33.
MOST_PREPENDED = 1024  # In bytes.


def growth_fault(normalizer: Any) -> str | None:  # noqa: ANN401 - JSON
    """What is wrong with a normalizer, if it makes long texts of short ones."""
    times, mapped, prepended = 1.0, 0, 0
    for step in _steps(normalizer):
        if step["type"] == "Replace":
            times *= _times(step["pattern"], step["content"])
        elif step["type"] == "Precompiled":
            mapped = max(mapped, 1) * _longest(step["precompiled_charsmap"])
        elif step["type"] == "Prepend":
            prepended += len(step["prepend"].encode())
    if times > MOST_REPLACED:
        return f"its normalizer makes a text up to {times:.3g} times as long; {MOST_REPLACED} times are served"
    if mapped > MOST_MAPPED:
        return f"its normalizer's table of characters makes {mapped} bytes of one text; {MOST_MAPPED} are served"
    if prepended > MOST_PREPENDED:
        return f"its normalizer puts {prepended} bytes in front of a text; {MOST_PREPENDED} are served"
    return None


def _steps(normalizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for part in normalizer["normalizers"] for step in _steps(part)]
    return [normalizer]


def _times(pattern: dict[str, str], content: str) -> float:
    """How many bytes are put in place of one, at most."""
    size = len(content.encode())
    if pattern.get("String"):
        return max(1.0, size / len(pattern["String"].encode()))
    return 1.0 + size  # A regular expression, or no text, may be found before each character.


def _longest(table: str) -> int:
    """Bytes of the longest text that a table of characters has; see charsmap.py for what is in it."""
    try:
        raw = base64.b64decode(table, validate=True)
    except binascii.Error:
        return 0  # The library has read it.
    return max(map(len, raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")))
