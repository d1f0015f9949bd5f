"""Small tokenizers that tests write: of bytes, in tokenizer.json, and of sentencepiece, in tokenizer.model."""

import io
import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import sentencepiece
from checkout import PROSE
from hf_models import smollm2_bf16

from tightrope.backends.files.hf_config import ModelShape, read_config
from tightrope.backends.hf.text.tokenizer import HFTokenizer

CORPUS = PROSE.read_text("utf-8") * 3
LLAMA_SHAPE = replace(read_config(smollm2_bf16()), raw={"eos_token_id": 2})


def trained(algorithm: str, **options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type=algorithm,
        vocab_size=560 if algorithm == "bpe" else 460,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


LLAMA_LIKE = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def llama_like(folder: Path) -> Path:
    """A folder as the first llamas had it: tokenizer.model, and the names of its tokens."""
    raw = trained("bpe", user_defined_symbols=["<tool>"], control_symbols=["[INST]"], **LLAMA_LIKE)
    (folder / "tokenizer.model").write_bytes(raw)
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    write(folder, "tokenizer_config.json", names | {"tokenizer_class": "LlamaTokenizer"})
    return folder


SMALL = {
    "version": "1.0",
    "added_tokens": [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": special}
        for i, (text, special) in enumerate([("<s>", True), ("</s>", True), ("<|eot_id|>", True), ("<think>", False)])
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "<|eot_id|>": 2, "<think>": 3, "a": 4, "Ġ": 5},
              "merges": []},
}  # fmt: skip
SMALL_SHAPE = replace(LLAMA_SHAPE, vocab_size=8, raw={})


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), "utf-8")


def copied(source: Path, target: Path) -> Path:
    return copytree(source, target / "copy")


def small(folder: Path, shape: ModelShape = SMALL_SHAPE, **parts: object) -> HFTokenizer:
    write(folder, "tokenizer.json", SMALL | parts)
    return HFTokenizer(folder, shape)


def joined(tokenizer: HFTokenizer, token_ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids)
