"""Lengths that a folder's files give beside max_position_embeddings: advice, of which only a RoPE section asks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.json import read_object

MAX_FILE = 64 << 20  # It is as in backends/files/generation.py.
OWN_FIELDS = ("max_sequence_length", "model_max_length")  # config.json itself has these.
FIELDS = (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length"))


def other_lengths(folder: Path, config: Mapping[str, Any]) -> dict[str, float]:
    """Tokens, by the fields' names; what is missing, or is no number, gives none. config is that of config.json."""
    found: dict[str, object] = {f"config.json's {field}": config.get(field) for field in OWN_FIELDS}
    for file, field in FIELDS:
        try:
            found[f"{file}'s {field}"] = read_object(folder / file, MAX_FILE, finite=False).get(field)
        except BackendError:  # Whoever needs the file says what is wrong with it.
            continue
    return {
        name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
