"""Models of transformers as GGUF files, written by the gguf package with its own names of their tensors.

Source: convert_hf_to_gguf.py of llama.cpp, for which rows are turned, which norms are one more, and what is written of
a configuration.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

Encoded = tuple[NDArray[Any], gguf.GGMLQuantizationType | None]
Encode = Callable[[str, NDArray[np.float32]], Encoded]


def as_float32(name: str, values: NDArray[np.float32]) -> Encoded:
    return values, None


def write_gguf(
    model: PreTrainedModel,
    architecture: str,
    path: Path,
    *,
    encode: Encode = as_float32,
    keys: Callable[[GGUFWriter], None] = lambda _: None,
    extra: dict[str, NDArray[np.float32]] | None = None,
    part_tensors: int = 0,
) -> Path:
    """Returns the file, or of several the first. encode: a tensor's bytes and type, by its name in the file.

    keys: adds to the metadata. extra: further tensors. part_tensors: so many in each part of a split model.
    """
    config = model.config
    writer = GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    _add_sizes(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    keys(writer)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in _tensors(model):
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name
        values, dtype = encode(called, _converted(name, tensor, architecture, config))
        writer.add_tensor(called, values, raw_dtype=dtype)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), path)


def _add_sizes(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401 - of any class
    fields = config.to_dict()
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if "rms_norm_eps" in fields:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "layer_norm_eps" in fields:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    rope = fields["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if experts := fields.get("num_local_experts") or fields.get("num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if "moe_intermediate_size" in fields:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if "shared_expert_intermediate_size" in fields:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, gate and up of experts apart, and of tied ones the embedding alone."""
    is_tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, 1)
            yield f"{prefix}gate_proj.weight", gate
            yield f"{prefix}up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        elif not (is_tied and name == "lm_head.weight"):
            yield name, tensor


def _converted(name: str, tensor: Tensor, architecture: str, config: Any) -> NDArray[np.float32]:  # noqa: ANN401
    values: NDArray[np.float32] = tensor.float().numpy()
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture in ("llama", "granite") and heads is not None:
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return values
