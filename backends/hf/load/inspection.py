"""A model folder, checked as far as that takes no weights: `serve` goes on from here, and `plan` ends here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import chat_templates
from tightrope.backends.files.hf_config import ModelShape, read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import Blueprint, draw
from tightrope.backends.hf.load.stages import LayOut
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.hf.text.vocabulary import has_tokenizer
from tightrope.backends.protocol import Tokenizer
from tightrope.backends.quant.find import check_asked
from tightrope.backends.rope.scaling import RopeSpec, resolve_rope
from tightrope.backends.settings import ModelSettings, written
from tightrope.backends.tensor_parallel import ALONE, Share


class NamedTokenizer(Tokenizer, Protocol):
    """One that chat templates can be given the named tokens of: see ModelCard."""

    @property
    def named_tokens(self) -> tuple[tuple[str, str | tuple[str, ...]], ...]: ...


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder holds. `tokenizer` is None where it has none: a folder of headers can be planned for.

    `notes` tell of the vocabulary, and of settings that change nothing on the device. `model_id` is what clients call
    the model, and `files` are those whose contents make it.
    """

    shape: ModelShape
    rope: Mapping[str, RopeSpec]
    tokenizer: NamedTokenizer | None
    blueprint: Blueprint
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...]
    model_id: str
    files: Sequence[Path]


class Inspect(Protocol):
    """What finds all of a model but the weights, as a rank has it."""

    def __call__(
        self, path: Path, settings: ModelSettings, device: torch.device | str = "cpu", share: Share = ALONE, /
    ) -> Inspection: ...


def inspect(
    folder: Path, settings: ModelSettings, device: torch.device | str = "cpu", share: Share = ALONE,
    lay_out: LayOut | None = None,
) -> Inspection:  # fmt: skip
    """Read all of a folder but its weights. Raises BackendError in one line for whatever can't be served.

    lay_out: see draw.
    """
    _check_options(settings)
    shape = read_config(folder)
    rope = resolve_rope(shape.raw, settings.rope, settings.max_model_len)
    checkpoint = Checkpoint.open(folder)
    tokenizer = HFTokenizer(folder, shape) if has_tokenizer(folder) else None
    templates = chat_templates(folder)
    blueprint = draw(folder, shape, checkpoint, rope, device, settings.dtype, share=share, lay_out=lay_out)
    check_asked(folder, settings.quantize, blueprint.quantization)
    for path in settings.adapters.values():
        blueprint.adapters.check(Path(path).expanduser())
    notes = idle_types(settings, device)
    if settings.dtype == "auto" and shape.dtype != "float16" and blueprint.activation_dtype == torch.float16:
        notes = ("dtype: float16, as the card has no bfloat16",)
    notes += () if tokenizer is None else tokenizer.notes
    files = [folder / "config.json", *(shard.path for shard in checkpoint.shards())]
    return Inspection(shape, rope, tokenizer, blueprint, templates, notes, model_id(folder), files)


def idle_types(settings: ModelSettings, device: torch.device | str) -> tuple[str, ...]:
    """A line for each setting that changes nothing on this device."""
    if torch.device(device).type == "cpu":
        idle = settings.types_on_a_card
        return tuple(f"{given} changes nothing: on a CPU hidden states and sums are float32" for given in idle)
    return ("--batch-invariant changes nothing: only a CPU has such sums",) if settings.batch_invariant else ()


def model_id(folder: Path) -> str:
    """What clients call the model: org/name where the hub's cache keeps it, else the folder's name."""
    folder = folder.absolute()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return folder.name


def _check_options(settings: ModelSettings) -> None:
    if settings.gpu_split is not None and settings.tensor_parallel not in (0, 1):
        raise BackendError(
            f"--gpu-split {written(settings.gpu_split)} lays layers out one after the other, and --tensor-parallel "
            "splits each of them; give only one of the two"
        )
    if settings.tensor_split or settings.split_mode != "layer":
        option = "--tensor-split" if settings.tensor_split else f"--split-mode {settings.split_mode}"
        raise BackendError(
            f"{option} is of GGUF files; --gpu-split says how many GiB of each card a folder's model takes"
        )
    for option, value in (("--gpu-layers", settings.gpu_layers), ("--n-cpu-moe", settings.n_cpu_moe)):
        if value:
            raise BackendError(
                f"{option} {value}: only a GGUF file's layers are put on a card one by one, and a folder's model runs "
                "whole on the card where there is one; leave it out"
            )
