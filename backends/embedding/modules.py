"""What a folder of sentence-transformers says of how a text's vector is made: modules.json and what it names.

Source: the file formats of sentence-transformers 5, as its models are published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.json import check_finite, read_object
from tightrope.backends.files.opened import read_bytes
from tightrope.backends.files.safetensors import Checkpoint

if TYPE_CHECKING:  # Plans are made without torch.
    from torch import Tensor

MODULES = "modules.json"
MAX_FILE = 1 << 20  # In bytes; real ones have some hundred.
MAX_MODULES = 16
MAX_PROMPTS, MAX_PROMPT = 256, 4096
# Keys of a pooling's file, in the order in which the vectors of several modes stand, and our names.
POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One layer behind the pooling: activation(x W' + b), W [out, in] float32."""

    weight: "Tensor"
    bias: "Tensor | None"
    activation: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a vector is made of the model's last hidden states."""

    transformer: Path  # The model's own files are in this folder.
    pooling: tuple[str, ...] = ("mean",)
    dense: tuple[Path, ...] = ()
    max_tokens: int | None = None
    is_lower_case: bool = False  # Texts are made so before they are cut into tokens.
    prompts: Mapping[str, str] | None = None
    default_prompt: str | None = None
    cut_to: int | None = None  # Vectors are meant to be cut to so many numbers.
    is_stated: bool = True  # Whether the folder says any of this.


def read_recipe(folder: Path) -> Recipe:
    """Raises BackendError in one line for files that are damaged, or name what this server does not compute."""
    if not (folder / MODULES).exists():
        return Recipe(folder, is_stated=False)
    transformer, pooling, dense = folder, None, []
    for number, (kind, path) in enumerate(_modules(folder)):
        match kind:
            case "Transformer" if number == 0:
                transformer = path
            case "Pooling" if pooling is None and number == 1:
                pooling = _pooling(path)
            case "Dense" if pooling is not None:
                dense.append(path)
            case "Normalize":
                pass  # Vectors have the length 1 where nobody asks for another one.
            case _:
                raise BackendError(f"{folder / MODULES}: module {number} is a {kind:.40}, which is not served there")
    if pooling is None:
        raise BackendError(f"{folder / MODULES}: it names no Pooling behind the Transformer; a text needs one vector")
    sizes = _optional(transformer / "sentence_bert_config.json")
    length = sizes.get("max_seq_length")
    if not (length is None or (isinstance(length, int) and 1 <= length <= 1 << 28)):
        raise BackendError(f"{transformer / 'sentence_bert_config.json'}: max_seq_length is {length!r:.40}; a number?")
    prompts, default = _prompts(folder / "config_sentence_transformers.json")
    cut_to = _optional(folder / "config_sentence_transformers.json").get("truncate_dim")
    return Recipe(
        transformer,
        pooling,
        tuple(dense),
        max_tokens=length,
        is_lower_case=sizes.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=default,
        cut_to=cut_to if isinstance(cut_to, int) and cut_to > 0 else None,
    )


def read_dense(folder: Path) -> DenseLayer:
    """A layer's weights, from safetensors alone. Raises BackendError."""
    config = read_object(folder / "config.json", MAX_FILE)
    name = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise BackendError(f"{folder / 'config.json'}: activation_function is {name:.40}; {', '.join(ACTIVATIONS)} are")
    checkpoint = Checkpoint.of_file(folder / "model.safetensors")
    for tensor in ("linear.weight", *(["linear.bias"] if config.get("bias", True) is True else [])):
        if tensor not in checkpoint.tensors:
            raise checkpoint.missing(tensor, "which the layer behind the pooling needs")
    weight = checkpoint.read("linear.weight").float().clone()
    bias = checkpoint.read("linear.bias").float().clone() if config.get("bias", True) is True else None
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise BackendError(f"{folder}: linear.weight and linear.bias are no layer: {tuple(weight.shape)}")
    return DenseLayer(weight, bias, name)


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Names of kinds and folders, in order."""
    import json

    path = folder / MODULES
    try:
        listed = json.loads(read_bytes(path, MAX_FILE))
    except ValueError:
        raise BackendError(f"{path}: not JSON") from None
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_MODULES:
        raise BackendError(f"{path}: it must be a list of 1 to {MAX_MODULES} modules")
    return [_module(path, folder, entry) for entry in listed]


def _module(path: Path, folder: Path, entry: object) -> tuple[str, Path]:
    kind = entry.get("type") if isinstance(entry, dict) else None
    where = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or not isinstance(where, str):
        raise BackendError(f"{path}: each module needs a type and a path")
    if not kind.startswith("sentence_transformers."):
        raise BackendError(f"{path}: {kind:.60} is code of the model's own, which is never run")
    inside = PurePosixPath(where)
    if inside.is_absolute() or ".." in inside.parts:
        raise BackendError(f"{path}: {where:.60} leads out of the model's folder")
    return kind.rpartition(".")[2], folder / inside


def _pooling(folder: Path) -> tuple[str, ...]:
    path = folder / "config.json"
    config = read_object(path, MAX_FILE)
    modes = tuple(name for key, name in POOLING.items() if config.get(key) is True)
    if (stated := config.get("pooling_mode")) is not None:  # The newer form names it, or several.
        modes = tuple(stated) if isinstance(stated, list) else (str(stated),)
    if not modes or not set(modes) <= set(POOLING.values()):
        raise BackendError(f"{path}: it names no pooling that is known; {', '.join(POOLING.values())} are")
    if config.get("include_prompt", True) is not True:
        raise BackendError(f"{path}: include_prompt is false: vectors without their prompt's tokens are not served")
    return modes


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    config = _optional(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    are_texts = isinstance(prompts, dict) and len(prompts) <= MAX_PROMPTS
    if not are_texts or not all(isinstance(text, str) and len(text) <= MAX_PROMPT for text in prompts.values()):
        raise BackendError(f"{path}: prompts must be up to {MAX_PROMPTS} texts of up to {MAX_PROMPT} characters")
    if default is not None and default not in prompts:
        raise BackendError(f"{path}: default_prompt_name is {default!r:.40}, which is none of its prompts")
    return prompts, default


def _optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    config = read_object(path, MAX_FILE, finite=False)
    check_finite(path, config)
    return config
