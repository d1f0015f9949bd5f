"""Tiny models that embed and rank, of random numbers, as folders of sentence-transformers and as GGUF files.

Source of the GGUF form: convert_hf_to_gguf.py of llama.cpp, for names, keys, and the blank that stands in front of what
begins a word.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "the cat dog sat ran on under mat tree red green big small and then it was very old man sea boat fish"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [*SPECIAL, *WORDS.split(), *LETTERS, *".,?!", *(f"##{letter}" for letter in LETTERS)]
MAX_TOKENS = 64
TEXTS = ("the cat sat on the mat", "a very old man and the sea", "then it ran under a big green tree. a dog?", "fish!")


def bert(seed: int = 0, *, num_labels: int | None = None, type_vocab_size: int = 2) -> PreTrainedModel:
    """In evaluation mode; with num_labels one that classifies. Its numbers are large enough that texts differ."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
        type_vocab_size=type_vocab_size,
        num_labels=2 if num_labels is None else num_labels,
    )
    model = BertModel(config, add_pooling_layer=False) if num_labels is None else BertForSequenceClassification(config)
    return _widened(model)


def qwen3(seed: int = 1) -> PreTrainedModel:
    """A decoder whose last token's state is a text's vector."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(PIECES),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
        architectures=["Qwen3ForCausalLM"],
    )
    return _widened(Qwen3Model(config))


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2:
                tensor.mul_(8)
            elif name.endswith("bias"):
                tensor.uniform_(-0.1, 0.1)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece, in small letters, with BERT's marks around a text and between two."""
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", PIECES.index("[CLS]")), ("[SEP]", PIECES.index("[SEP]"))]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, mask_token="[MASK]", model_input_names=inputs, **names)


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    *,
    pooling: str | None = "mean_tokens",
    dense: Sequence[tuple[int, str]] = (),
    normalize: bool = True,
    **prompts: object,
) -> Path:
    """pooling: of modules.json, None without one. dense: outputs and activation of layers behind it.

    prompts: fields of config_sentence_transformers.json.
    """
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if pooling is None:
        return folder
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    places = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    listed = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    write_json(folder / "modules.json", listed)
    modes = {"pooling_mode_max_tokens": False, f"pooling_mode_{pooling}": True}
    write_json(folder / "1_Pooling/config.json", modes)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    if prompts:
        write_json(folder / "config_sentence_transformers.json", prompts)
    width = model.config.hidden_size
    for number, (outputs, activation) in enumerate(dense, 2):
        place = folder / f"{number}_Dense"
        name = f"torch.nn.modules.activation.{activation}"
        write_json(place / "config.json", {"in_features": width, "out_features": outputs, "bias": True,
                                           "activation_function": name})  # fmt: skip
        generator = torch.Generator().manual_seed(number)
        layer = {
            "linear.weight": torch.randn(outputs, width, generator=generator),
            "linear.bias": torch.randn(outputs, generator=generator),
        }
        save_file(layer, place / "model.safetensors")
        width = outputs
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_gguf(path: Path, model: PreTrainedModel, pooling: gguf.PoolingType, **keys: Any) -> Path:  # noqa: ANN401
    """A BERT's or Qwen3's file; keys: further lists in the metadata, by their names behind the architecture's."""
    config, architecture = model.config, "bert" if isinstance(model.config, BertConfig) else "qwen3"
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_pooling_type(pooling)
    if architecture == "bert":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_vocabulary(writer)
    for key, value in keys.items():
        writer.add_array(f"{architecture}.{key}", value)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in _tensors(model).items():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name
        writer.add_tensor(called, np.ascontiguousarray(tensor.detach().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """By the names that the converter knows: those of a ranking BERT's head are roberta's."""
    heads = {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        module, _, kind = name.rpartition(".")
        found[f"{heads.get(module, module)}.{kind}".removeprefix("bert.")] = tensor
    return found


def _add_vocabulary(writer: GGUFWriter) -> None:
    def written(piece: str) -> str:
        if piece in SPECIAL:
            return piece
        return piece[2:] if piece.startswith("##") else f"\u2581{piece}"

    writer.add_tokenizer_model("bert")
    writer.add_token_list([written(piece) for piece in PIECES])
    kinds = [gguf.TokenType.CONTROL if piece in SPECIAL else gguf.TokenType.NORMAL for piece in PIECES]
    writer.add_token_types(kinds)
    for add, piece in (
        (writer.add_bos_token_id, "[CLS]"),
        (partial(writer.add_uint32, "tokenizer.ggml.cls_token_id"), "[CLS]"),
        (writer.add_sep_token_id, "[SEP]"),
        (writer.add_eos_token_id, "[SEP]"),
        (writer.add_unk_token_id, "[UNK]"),
        (writer.add_pad_token_id, "[PAD]"),
        (writer.add_mask_token_id, "[MASK]"),
    ):
        add(PIECES.index(piece))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@torch.inference_mode()
def states(model: PreTrainedModel, text: str) -> torch.Tensor:
    """[T, D] float64: the last hidden states of a text, by transformers in float64."""
    exact = model.double()
    try:
        return exact(torch.tensor([tokenizer()(text)["input_ids"]])).last_hidden_state[0]
    finally:
        model.float()
