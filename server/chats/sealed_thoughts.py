"""Thoughts as one word that a client brings back without reading it, in dialects that have such a field.

It is no cipher: the client has been shown the same thoughts, or could have been.
"""

import base64
import binascii
from hashlib import sha256

_SEAL = "tightrope-thoughts:"


def sealed(thought: str) -> str:
    """All of the thoughts."""
    return _SEAL + base64.b64encode(thought.encode("utf-8", "replace")).decode()


def unsealed(word: str) -> str | None:
    """The thoughts again; None for a word that isn't of this server."""
    if not word.startswith(_SEAL):
        return None
    try:
        return base64.b64decode(word.removeprefix(_SEAL), validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return None


def signature(thought: str) -> str:
    """A name for thoughts that stand beside it: clients leave out those without one."""
    return f"tightrope-{sha256(thought.encode('utf-8', 'replace')).hexdigest()[:32]}"
