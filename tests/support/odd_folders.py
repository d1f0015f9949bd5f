"""Model folders whose tokenizers are spread over their files in the ways that published ones are."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import sentencepiece
from hf_models import smollm2_bf16

from tightrope.backends.files.hf_config import ModelShape, read_config
from tightrope.backends.hf.text.tokenizer import HFTokenizer

WORDS = [
    *("the", "ferry", "leaves", "the", "pier", "at", "dawn", "and", "returns", "at", "dusk"),
    *("with", "bread", "and", "salt", "for", "the", "old", "harbour"),
]
CORPUS = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) + f" {i}, {'ab'[i % 2]}" for i in range(300)]
# byte fallback, and nothing done to the text: as in Llama, Mistral, Yi
PLAIN = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}

HARD = [
    "the ferry",
    "  two   spaces    and more        ",
    "\n\nlines\r\n\tand tabs\n ",
    "Family 👨‍👩‍👧‍👦, flag 🇰🇷, skin 👍🏽",
    "日本語とEnglishが混ざった文、안녕하세요",
    "e\u0301 a\u0308\u0323 combining, z\u0351\u0334algo ﬁ Å",
    "\ufeffbyte order mark \ufeff",
    "nul \0 and \x01",
    "▁ under ▁▁ line",
    "\U0010ffff the last character \U0010ffff",
    "supercalifragilistic" * 40,
    " ",
    "       ",
    "<0x41> <unused0> &lt;s&gt;",
    "12345 67,890.12 == != <= ->",
]


def write(folder: Path, files: Mapping[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / name).write_bytes(raw)
    return folder


@cache
def trained(algorithm: str = "bpe", size: int = 400, **options: object) -> bytes:
    """A small sentencepiece model; lists are given as texts with commas."""
    model = io.BytesIO()
    lists = {
        name: value.split(",") if isinstance(value, str) and "_symbols" in name else value
        for name, value in options.items()
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=algorithm,
        vocab_size=size,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **(PLAIN | lists),
    )
    return model.getvalue()


def pieces(raw: bytes) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    return [model.id_to_piece(i) for i in range(model.vocab_size())]


def _alphabet() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def flagged(text: str, special: bool = True, **flags: bool) -> dict[str, object]:
    base = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **base, **flags, "special": special}


def listed(tokens: Mapping[int, dict[str, object]]) -> list[dict[str, object]]:
    return [{"id": i, **token} for i, token in tokens.items()]


BASE = {0: flagged("<unk>"), 1: flagged("<s>"), 2: flagged("</s>")}
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
FAST = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = NAMES | {"tokenizer_class": "LlamaTokenizer"}


def byte_level(added: Mapping[int, dict[str, object]] = BASE, more: tuple[str, ...] = ()) -> dict[str, object]:
    """A byte-level tokenizer.json: ids 0 to 2 are marks, 3 to 258 bytes, then `more` pieces that nothing merges to."""
    vocab = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *_alphabet(), *more])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": listed(added), "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []},
    }  # fmt: skip


def shape(vocab_size: int, **config: object) -> ModelShape:
    return replace(read_config(smollm2_bf16()), vocab_size=vocab_size, raw=config)


def config(**more: object) -> dict[str, object]:
    """A config.json for transformers' AutoTokenizer."""
    return {"model_type": "llama", "vocab_size": 2048, **more}


def bytes_of(tokenizer: HFTokenizer, token_ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids)
