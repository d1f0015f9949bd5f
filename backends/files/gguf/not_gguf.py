"""Names by its first bytes what a person has in hand where a GGUF file should be."""

import re

from tightrope.backends.files.foreign import told_by_start

_SHOWN = 40  # A line shows so many bytes.


def describe(start: bytes, num_bytes: int) -> str:
    """What a file of `num_bytes` bytes is that starts so and is no GGUF file, and what to do, as the end of a line."""
    if start.startswith(b"FUGG"):
        return "it is a GGUF file written for big-endian machines; convert it for little-endian ones"
    if (told := told_by_start(start, num_bytes)) is not None:
        return told
    if re.match(rb'.{8}\{\s*"', start, re.DOTALL) and int.from_bytes(start[:8], "little") < num_bytes:
        return "it is a safetensors file; name the folder that it is in"
    return f"it starts with {start[:_SHOWN]!r} instead of b'GGUF'; name a .gguf file, or a model's folder"
