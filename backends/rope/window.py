"""Which window a section's scaling starts from, and which it reaches.

Files of yarn, llama3 and longrope give the original window. Those of linear and dynamic models often don't, and some of
them give `max_position_embeddings` before scaling, as transformers' formula for dynamic has it, and some after.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tightrope.backends.rope.config import ORIGINAL, RopeConfig, Section, kind_of

Witnesses = Mapping[str, float]  # A model's files give these lengths in tokens, by the names of their fields.


@dataclass(frozen=True, slots=True)
class Windows:
    """Both in tokens. `note` says what the files disagree about; empty where they don't."""

    trained_len: int
    reach: int
    note: str = ""


def own_windows(section: Section, rope: RopeConfig, witnesses: Witnesses) -> Windows:
    """The windows of a section as the model's files mean them."""
    kind = kind_of(section)
    original = _original(section, rope)
    if kind in ("none", "llama3", "longrope"):
        return Windows(original if kind != "none" else rope.max_len, rope.max_len)
    if kind == "yarn" or ORIGINAL in section or rope.outer_len:
        return Windows(original, round(section.get("factor", rope.max_len / original) * original))
    factor = float(section["factor"])
    after = Windows(int(rope.max_len / factor), rope.max_len)
    before = Windows(rope.max_len, round(rope.max_len * factor))
    if kind == "linear" and rope.has_layer_kinds:  # Gemma 3 has such layers.
        return after
    if kind == "ntk" or factor == 1:
        return before
    for_after = [name for name, length in witnesses.items() if length == after.reach]
    for_before = [name for name, length in witnesses.items() if length == before.reach]
    if for_after and for_before:
        smaller = min(after, before, key=lambda windows: windows.reach)
        note = (
            f"window: {after.reach} tokens by {' and '.join(for_after)}, {before.reach} by {' and '.join(for_before)}; "
            "the smaller one is served unless --max-model-len says otherwise"
        )
        return Windows(smaller.trained_len, smaller.reach, note)
    return after if for_after else before


def _original(section: Section, rope: RopeConfig) -> int:
    """The window before scaling, if the file gives it; the value beside the section has priority, as in transformers.

    Where transformers uses one, read_rope has brought it into the section.
    """
    if kind_of(section) in ("yarn", "llama3", "longrope"):
        return int(section.get(ORIGINAL, rope.max_len))
    return int(rope.outer_len or section.get(ORIGINAL, rope.max_len))
