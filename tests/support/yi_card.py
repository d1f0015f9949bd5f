"""The model that this server was made for, in small: a ChatML tune of Yi-34B-200K, in the forms that people have.

Its vocabulary is Yi's in layout: the end of text is 2, and the marks of ChatML are pieces 6 to 8 that no flag makes
special. Its weights answer every prompt with ANSWER and `<|im_end|>`, and go on from there as from a prompt.
"""

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from checkout import PROSE
from gguf import TokenType
from gguf_files import write_model
from quantizers import exl2, gptq
from quantizers.calibration import FAMILIES, Calibrated
from safetensors.torch import save_file
from torch import Tensor

END_OF_TEXT, IM_START, IM_END = 2, 6, 7
WINDOW = 200_000
ANSWER = "The night train leaves at nine"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_VOCAB, _HIDDEN, _HEADS = 576, 128, 2
_TEXT = PROSE.read_text("utf-8")
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": _HIDDEN,
    "intermediate_size": _HIDDEN,
    "max_position_embeddings": WINDOW,
    "num_attention_heads": _HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": _HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5_000_000.0,
    "tie_word_embeddings": False,
    "vocab_size": _VOCAB,
}
_TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "model_max_length": 4096,
    "tokenizer_class": "LlamaTokenizer",
    "chat_template": CHATML,
}


def write_bf16(folder: Path) -> Path:
    """The folder as it was trained."""
    vocabulary = _vocabulary()
    tensors = {name: tensor.bfloat16() for name, tensor in _weights(_answer_ids(vocabulary)).items()}
    return _folder(folder, vocabulary, tensors, "bfloat16", {})


def write_gptq(folder: Path) -> Path:
    vocabulary = _vocabulary()
    tensors = gptq.quantize(_calibrated(_weights(_answer_ids(vocabulary))))
    return _folder(folder, vocabulary, tensors, "float16", {"quantization_config": gptq.CONFIG})


def write_exl2(folder: Path) -> Path:
    vocabulary = _vocabulary()
    tensors, bits = exl2.quantize(_calibrated(_weights(_answer_ids(vocabulary))), exl2.plain(4))
    settings = {"quant_method": "exl2", "version": "0.3.2", "bits": round(bits, 2), "head_bits": 6}
    return _folder(folder, vocabulary, tensors, "float16", {"quantization_config": settings})


def write_gguf(folder: Path, user_defined: TokenType = TokenType.USER_DEFINED) -> Path:
    """The path of a file in float32."""
    source = write_bf16(folder / "source")
    path = write_model(source, folder / "yi.gguf", user_defined)
    shutil.rmtree(source)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "bf16": write_bf16,
    "gptq": write_gptq,
    "exl2": write_exl2,
    "gguf": write_gguf,
    "gguf of an older converter": partial(write_gguf, user_defined=TokenType.NORMAL),
}


def _vocabulary() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*[ANSWER] * 100, *_TEXT.splitlines()]),  # so that its words are pieces
        model_writer=model,
        model_type="bpe",
        vocab_size=_VOCAB,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        user_defined_symbols=["<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def _answer_ids(vocabulary: bytes) -> list[int]:
    token_ids: list[int] = sentencepiece.SentencePieceProcessor(model_proto=vocabulary).encode(ANSWER)
    assert len(token_ids) == len(set(token_ids)) < _HIDDEN, "a token of the answer is followed by one other"
    return token_ids


def _weights(answer: list[int]) -> dict[str, Tensor]:
    """A chain: every embedding is a direction, 0 for all tokens but the answer's, and the head reads the next one."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(_VOCAB, _HIDDEN)
    table[:, 0] = 1.0
    head = torch.zeros(_VOCAB, _HIDDEN)
    for direction, token_id in enumerate(answer, 1):
        table[token_id] = torch.eye(_HIDDEN)[direction]
        head[token_id, direction - 1] = 4.0
    head[IM_END, len(answer)] = 4.0
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(_HIDDEN), "lm_head.weight": head}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = torch.ones(_HIDDEN)
    for family in FAMILIES:
        for name in family:  # noise, small beside the embeddings
            weight = 0.02 * torch.randn(_HIDDEN, _HIDDEN, generator=generator)
            tensors[f"model.layers.0.{name}.weight"] = weight
    return tensors


def _calibrated(tensors: dict[str, Tensor]) -> Calibrated:
    hessians = {f"model.layers.0.{family[0]}": torch.eye(_HIDDEN) for family in FAMILIES}
    return Calibrated(Path(), tensors, hessians | {"lm_head": torch.eye(_HIDDEN)}, 1)


def _folder(folder: Path, vocabulary: bytes, tensors: dict[str, Tensor], dtype: str, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG | {"torch_dtype": dtype} | settings))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "tokenizer.model").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))
    return folder
