"""Whether a model's cached tokens can be used at other places, and what a person is told of it at the start."""

from collections.abc import Sequence

from tightrope.backends.hf.modules.step import LayerInfo
from tightrope.backends.reuse import CacheReuse


def why_unmovable(layers: Sequence[LayerInfo]) -> str | None:
    """What keeps cached tokens at the places that they were computed for; None where nothing does."""
    if any(layer.spec.window is not None for layer in layers):
        return "some layers see a window alone"
    if any(layer.rope is None for layer in layers):
        return "some layers cache keys that say where they stand"
    return None


def reuse_note(asked: CacheReuse, unmovable: str | None) -> str:
    """The line of the start."""
    if asked == "exact":
        return "cached tokens: exact ones alone, as asked; behind a removed message all is computed"
    if unmovable is not None:
        return f"cached tokens: exact ones alone, since {unmovable}; behind a removed message all is computed"
    return "cached tokens: what stands behind a removed message is moved, and computed again while nothing runs"
