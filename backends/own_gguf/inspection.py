"""A GGUF file as the torch engine sees it: checked as far as that takes no weights."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import DEFAULT
from tightrope.backends.files.gguf.header import Header
from tightrope.backends.files.hf_config import shape_of
from tightrope.backends.gguf.model_file import read_model
from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.gguf.tokenizer import GGUFTokenizer
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.inspection import Inspection, idle_types
from tightrope.backends.own_gguf.adapters import read_any_adapter
from tightrope.backends.own_gguf.checkpoint import checkpoint_of, small_numbers
from tightrope.backends.own_gguf.config import config_of
from tightrope.backends.quant.find import Quantization
from tightrope.backends.quant.gguf import GgufBlocks
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import ALONE, Share

_DTYPE = "float32"  # Of weights in modules that keep transformers' class, as all that isn't a matrix has it in files.
_MOST_NAMED = 4


def inspect(
    path: Path, settings: ModelSettings, device: torch.device | str = "cpu", share: Share = ALONE
) -> Inspection:
    """Read all of a file but its weights. Raises BackendError in one line for whatever can't be served."""
    if torch.device(device).type != "cpu":
        raise BackendError(
            f"--gguf-engine own: it runs GGUF files on a CPU, and the device is {device}; add --device cpu"
        )
    header = read_model(path, settings)
    shape = shape_of(path, {**config_of(header, partial(small_numbers, header)), "dtype": _DTYPE})
    checkpoint = checkpoint_of(header)
    rope = resolve_rope(shape.raw, settings.rope, settings.max_model_len)
    vocabulary = NativeModel(path, ModelOptions(is_vocabulary=True))
    tokenizer = GGUFTokenizer(vocabulary)
    quantization = Quantization(GgufBlocks(), checkpoint)
    blueprint = draw(path, shape, checkpoint, rope, device, settings.dtype, quantization, share)
    if blueprint.left.names:  # A bias that were left out would change all answers.
        unused = [repr(name) for name in checkpoint.tensors if name in blueprint.left.names]
        more = f" and {len(unused) - _MOST_NAMED} more" if len(unused) > _MOST_NAMED else ""
        raise BackendError(f"{path}: its architecture has no {', '.join(unused[:_MOST_NAMED])}{more}")
    blueprint.adapters.read = partial(read_any_adapter, header)
    for adapter in settings.adapters.values():
        blueprint.adapters.check(Path(adapter).expanduser())
    notes = idle_types(settings, device) + header.notes + vocabulary.notes
    files = [file.path for file in header.files]
    return Inspection(shape, rope, tokenizer, blueprint, _templates(header, vocabulary), notes, path.stem, files)


def _templates(header: Header, vocabulary: NativeModel) -> Mapping[str, str]:
    """Chat templates by name; an only one is the default, whatever its name."""
    templates = dict(header.chat_templates)
    if (default := vocabulary.chat_template()) is not None:
        templates[DEFAULT] = default
    elif len(templates) == 1:
        templates.setdefault(DEFAULT, *templates.values())
    return templates
