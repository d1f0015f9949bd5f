"""From the files straight to their place: shard by shard, each tensor checked and copied once.

Everything that headers can tell is checked before anything is allocated: no tensor missing, none unused, every shape as
the model has it. At most the model and one mapped shard are in memory.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.checkpoint import Checkpoint
from tightrope.backends.hf.weights import Part, Weight

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FLOATS = tuple(DTYPES)

# names of modules in older files, by those in transformers 5
RENAMES: tuple[tuple[str, str], ...] = (
    ("", ""),
    (".mlp.", ".block_sparse_moe."),  # Mixtral, MiniMax
    ("lm_head.", "embed_out."),  # GPT-NeoX
)

# computed by every model that has them, and yet in some old files
IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|masked_bias)$")

Progress = Callable[[float], None]  # of the share loaded, 0 to 1


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the file goes."""

    target: Tensor
    part: Part


def load_weights(
    weights: Iterable[Weight], checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device, progress: Progress
) -> None:
    """Fill `weights` from the checkpoint.

    Raises BackendError naming the tensor that is missing, unused, of another shape or dtype, or not finite.
    """
    chosen = [(weight, _choose(weight, checkpoint, model.base_model_prefix)) for weight in weights]
    _check_used({part.name for _, parts in chosen for part in parts}, checkpoint, model)
    places: dict[str, list[_Place]] = {}
    shifted: list[tuple[Tensor, float]] = []
    for weight, parts in chosen:
        target = torch.empty(weight.shape, dtype=weight.dtype or _widest(parts, checkpoint), device=device)
        weight.deliver(target)
        if weight.offset:
            shifted.append((target, weight.offset))
        for part in parts:
            places.setdefault(part.name, []).append(_Place(target, part))
    done = 0
    for shard in checkpoint.shards():
        for name in shard.names:
            if name in places:
                tensor = checkpoint.read(name)
                checkpoint.check_finite(name, tensor)
                for place in places[name]:
                    place.target[place.part.at].copy_(tensor)
            done += checkpoint.tensors[name].num_bytes
            progress(done / checkpoint.weight_bytes)
        checkpoint.release(shard)
    for target, offset in shifted:
        target.add_(offset)


def _choose(weight: Weight, checkpoint: Checkpoint, prefix: str) -> tuple[Part, ...]:
    """The source that the files have, under the names that they use; its shapes are checked."""
    has_prefix = any(name.startswith(f"{prefix}.") for name in checkpoint.tensors)
    for source in weight.sources:
        for new, old in RENAMES:
            parts = tuple(_renamed(part, new, old, "" if has_prefix else f"{prefix}.") for part in source)
            if all(part.name in checkpoint.tensors for part in parts):
                for part in parts:
                    _check_part(part, checkpoint)
                return parts
    names = [part.name for part in weight.sources[0]]
    missing = next(name for name in names if name not in checkpoint.tensors)
    raise BackendError(f"{checkpoint.folder}: tensor {missing!r} is missing; config.json describes a model that has it")


def _renamed(part: Part, new: str, old: str, without: str) -> Part:
    name = part.name.removeprefix(without)
    return Part(name.replace(new, old) if new else name, part.shape, part.at)


def _check_part(part: Part, checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors[part.name]
    if entry.shape != part.shape:
        raise BackendError(
            f"{entry.file}: tensor {part.name!r} has shape {list(entry.shape)}, by config.json it must be "
            f"{list(part.shape)}"
        )
    if entry.dtype not in DTYPES:
        raise BackendError(f"{entry.file}: tensor {part.name!r} is {entry.dtype}; {', '.join(DTYPES)} can be loaded")


def _check_used(used: set[str], checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    declared: Iterable[str] = model._keys_to_ignore_on_load_unexpected or ()
    unused = [
        name
        for name in checkpoint.tensors
        if name not in used and not IGNORED.search(name) and not any(re.search(rule, name) for rule in declared)
    ]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        entry = checkpoint.tensors[unused[0]]
        raise BackendError(
            f"{entry.file}: tensor {unused[0]!r}{more} has no place in the model that config.json describes"
        )


def _widest(parts: Iterable[Part], checkpoint: Checkpoint) -> torch.dtype:
    found = {DTYPES[checkpoint.tensors[part.name].dtype] for part in parts}
    return found.pop() if len(found) == 1 else torch.float32
