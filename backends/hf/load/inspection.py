"""A model folder, checked as far as that takes no weights: `serve` goes on from here, and `plan` ends here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import chat_templates
from tightrope.backends.files.hf_config import ModelShape, read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import Blueprint, draw
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.hf.text.vocabulary import has_tokenizer
from tightrope.backends.quant.find import check_asked
from tightrope.backends.rope.scaling import RopeSpec, resolve_rope
from tightrope.backends.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder holds. `tokenizer` is None where it has none: a folder of headers can be planned for.

    `notes` tell of the settings that change nothing on the device.
    """

    shape: ModelShape
    rope: Mapping[str, RopeSpec]
    tokenizer: HFTokenizer | None
    blueprint: Blueprint
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...]


def inspect(folder: Path, settings: ModelSettings, device: torch.device | str = "cpu") -> Inspection:
    """Read all of a folder but its weights. Raises BackendError in one line for whatever can't be served."""
    _check_options(settings)
    shape = read_config(folder)
    rope = resolve_rope(shape.raw, settings.rope, settings.max_model_len)
    checkpoint = Checkpoint.open(folder)
    tokenizer = HFTokenizer(folder, shape) if has_tokenizer(folder) else None
    templates = chat_templates(folder)
    blueprint = draw(folder, shape, checkpoint, rope, device, settings.dtype)
    check_asked(folder, settings.quantize, blueprint.quantization)
    for path in settings.adapters.values():
        blueprint.adapters.check(Path(path).expanduser())
    idle = settings.types_on_a_card if torch.device(device).type == "cpu" else ()
    notes = tuple(f"{given} changes nothing: on a CPU hidden states and sums are float32" for given in idle)
    if settings.dtype == "auto" and shape.dtype != "float16" and blueprint.activation_dtype == torch.float16:
        notes = ("dtype: float16, as the card has no bfloat16",)
    return Inspection(shape, rope, tokenizer, blueprint, templates, notes)


def _check_options(settings: ModelSettings) -> None:
    for option, value in (("--gpu-layers", settings.gpu_layers), ("--n-cpu-moe", settings.n_cpu_moe)):
        if value:
            raise BackendError(
                f"{option} {value}: only a GGUF file's layers are put on a card one by one, and a folder's model runs "
                "whole on the card where there is one; leave it out"
            )
