"""Names by its first bytes what a person has in hand where a GGUF file should be."""

import re

_STARTS = {
    b"PK\x03\x04": "a zip archive or pickled PyTorch weights, which are never loaded, as they can run code",
    b"\x80\x02": "pickled weights, which are never loaded, as they can run code",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"FUGG": "a GGUF file written for big-endian machines; convert it for little-endian ones",
}
SNIFFED = 256  # bytes from the start that `describe` wants to see
_SHOWN = 40


def describe(start: bytes, num_bytes: int) -> str:
    """What a file of `num_bytes` bytes is that starts so and is no GGUF file, and what to do, as the end of a line."""
    if num_bytes == 0:
        return "it is empty; copy or download it again"
    for head, words in _STARTS.items():
        if start.startswith(head):
            return f"it is {words}"
    if not start.strip(b"\0"):
        return "it begins with zeros, as downloads that were broken off do; download it again"
    if re.match(rb"\s*(<!doctype|<html|<\?xml)", start, re.IGNORECASE):
        return "it is a web page, perhaps of a failed download; download the file itself"
    if re.match(rb'.{8}\{\s*"', start, re.DOTALL) and int.from_bytes(start[:8], "little") < num_bytes:
        return "it is a safetensors file; name the folder that it is in"
    return f"it starts with {start[:_SHOWN]!r} instead of b'GGUF'; {_hint(start)}"


def _hint(start: bytes) -> str:
    is_text = all(byte >= 0x20 or byte in b"\t\r\n" for byte in start)
    return "it is a text, perhaps of a failed download" if is_text else "name a .gguf file, or a model's folder"
