"""The tokens that a GGUF file names: what begins a prompt, ends a turn, pads.

llama.cpp puts default ids in the place of those that a file leaves out. They are those of the first LLaMA, or of
Falcon: in most other vocabularies an ordinary letter has the id 11.
"""

import ctypes
from collections.abc import Mapping

from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.native import NativeModel

# names that chat templates use -> keys; the last but one is spelt so in the format
_KEYS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "cls_token": "cls",
    "sep_token": "seperator",
    "mask_token": "mask",
}
# Texts that end a turn in every vocabulary that has them as tokens.
_ENDS = frozenset(
    {
        *("</s>", "<eos>", "<EOT>", "[EOS]", "[EOT]"),
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"),
        *("<end_of_turn>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>"),
    }
)
_SENTENCEPIECE = (ll.LLAMA_VOCAB_TYPE_SPM, ll.LLAMA_VOCAB_TYPE_UGM)


def named_ids(model: NativeModel) -> dict[str, int]:
    """Ids of the tokens that the file names and its vocabulary has, by the names that chat templates use."""
    ids = {name: _number(model, f"tokenizer.ggml.{key}_token_id") for name, key in _KEYS.items()}
    return {name: i for name, i in ids.items() if i is not None and 0 <= i < model.vocab_size}


def bos_id(model: NativeModel, named: Mapping[str, int]) -> int | None:
    """What begins a prompt: the token that the file names, or the one that sentencepiece puts there by itself."""
    if "bos_token" in named:
        return named["bos_token"]
    default: int = ll.llama_vocab_bos(model.vocab)
    is_usual = default >= 0 and ll.llama_vocab_type(model.vocab) in _SENTENCEPIECE
    return default if is_usual and ll.llama_vocab_is_control(model.vocab, default) else None


def end_ids(model: NativeModel, named: Mapping[str, int]) -> frozenset[int]:
    """What ends a turn: tokens that the file names as ends, and those whose texts llama.cpp knows as such."""
    ends = {i for i in range(model.vocab_size) if ll.llama_vocab_is_eog(model.vocab, i)}
    default = ll.llama_vocab_eos(model.vocab)
    if "eos_token" not in named and default >= 0:
        text = ll.llama_vocab_get_text(model.vocab, default) or b""
        if text.decode(errors="replace") not in _ENDS:
            ends.discard(default)
    return frozenset(ends)


def _number(model: NativeModel, key: str) -> int | None:
    out = ctypes.create_string_buffer(32)
    size = ll.llama_model_meta_val_str(model.pointer, key.encode(), out, len(out))
    text = out.value.decode(errors="replace")
    return int(text) if 0 <= size < len(out) and text.isdecimal() else None
