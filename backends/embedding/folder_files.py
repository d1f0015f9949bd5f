"""What the files of a folder tell of a model that embeds or ranks, and what it takes, without transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightrope.backends.embedding.card import Kind
from tightrope.backends.embedding.modules import Recipe, read_recipe
from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import MAX_CONFIG
from tightrope.backends.files.json import read_object
from tightrope.backends.files.safetensors import Checkpoint

RANKS = "ForSequenceClassification"
_ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")  # Such classes, without modules.json, are read as encoders.
_SIZES = {"hidden_size": 1 << 20, "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14, "vocab_size": 1 << 24}
# Their positions count from behind the number of the padding token.
_SHIFTED = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"})
_FLOAT = 4
_ENTRY_BYTES = 500  # A token of the vocabulary takes so much, measured with 30,522 of them.


@dataclass(frozen=True, slots=True)
class VectorFolder:
    """Checked files. max_tokens: of a text, as asked for or as the model was trained for, whichever is less."""

    path: Path
    recipe: Recipe
    config: Mapping[str, Any]
    kind: Kind
    max_tokens: int
    num_params: int

    @classmethod
    def read(cls, path: Path, max_tokens: int) -> "VectorFolder":
        """Raises BackendError in one line that names the file and what is wrong."""
        recipe = read_recipe(path)
        where = recipe.transformer / "config.json"
        config = read_object(where, MAX_CONFIG, finite=False)
        architecture = _architecture(where, config)
        is_ranking = architecture.endswith(RANKS) and not recipe.is_stated
        if "quantization_config" in config:
            raise BackendError(
                f"{where}: its weights are quantized; give the same model as a GGUF file, or unquantized"
            )
        if config.get("is_encoder_decoder") is True:
            raise BackendError(f"{where}: {architecture:.60} has an encoder and a decoder, which is not served here")
        if not is_ranking and not recipe.is_stated and not architecture.endswith(_ENCODERS):
            raise BackendError(
                f"{path}: it makes no vectors of texts: {architecture:.60}, without a modules.json; name it with "
                "--model, or give an embedding or reranking model"
            )
        if is_ranking and _num_labels(config) != 1:
            raise BackendError(f"{where}: it tells {_num_labels(config)} labels apart; a reranker has one")
        for field, most in _SIZES.items():
            size = config.get(field, 1)
            if not isinstance(size, int) or not 1 <= size <= most:
                raise BackendError(f"{where}: {field} is {size!r:.40}; it must be a number from 1 to {most}")
        num_params = sum(_numbers(entry.shape) for entry in Checkpoint.open(recipe.transformer).tensors.values())
        longest = _trained(where, config) if recipe.max_tokens is None else recipe.max_tokens
        kind: Kind = "reranking" if is_ranking else "embedding"
        return cls(path, recipe, config, kind, min(max_tokens, longest), num_params)

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def is_nested(self) -> bool:
        """Whether the first numbers of a vector are one by themselves.

        Sources: vLLM's words in config.json, sentence-transformers' truncate_dim, and the cards of the two families.
        """
        told = self.config.get("is_matryoshka") is True or self.config.get("matryoshka_dimensions")
        return bool(told) or self.recipe.cut_to is not None or self.config.get("model_type") in ("qwen3", "gemma3_text")

    @property
    def weight_bytes(self) -> int:
        return _FLOAT * self.num_params

    @property
    def workspace_bytes(self) -> int:
        """Of a text: values of one layer, and one layer's weights of attention, before and after the softmax.

        Beside them is the tokenizer's vocabulary.
        """
        width = int(self.config.get("hidden_size", 1024))
        inner = int(self.config.get("intermediate_size") or 4 * width)
        heads = int(self.config.get("num_attention_heads", 16))
        values = _FLOAT * self.max_tokens * (8 * width + 3 * inner + 2 * heads * self.max_tokens)
        return values + _ENTRY_BYTES * int(self.config.get("vocab_size", 0))


def _architecture(where: Path, config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise BackendError(f"{where}: architectures must name the model's class, such as BertModel")
    return named[0]


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else int(config.get("num_labels", 2))


def _trained(where: Path, config: Mapping[str, Any]) -> int:
    length = config.get("max_position_embeddings", 512)
    if not isinstance(length, int) or not 1 <= length <= 1 << 28:
        raise BackendError(
            f"{where}: max_position_embeddings is {length!r:.40}; it must be a number from 1 to {1 << 28}"
        )
    shift = int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _SHIFTED else 0
    return max(1, length - shift)


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
