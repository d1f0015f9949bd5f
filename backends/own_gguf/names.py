"""What GGUF files call the tensors of transformers' modules, by architecture.

Source: the tensor names of llama.cpp's gguf-py (constants.py, tensor_mapping.py), which its converter writes.
"""

import re
from collections.abc import Mapping

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
# Tensors with the matrices of all experts, one after another: [E, N, K].
STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}

_PLAIN = _ATTENTION | _MLP | _TWO_NORMS
NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _PLAIN | _EXPERTS,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "qwen2moe": _PLAIN | _EXPERTS,
    "qwen3moe": _PLAIN | _EXPERTS,
    "gemma": _PLAIN,
    "gemma2": _ATTENTION | _MLP | _FOUR_NORMS,
    "gemma3": _ATTENTION | _MLP | _FOUR_NORMS,
    "phi3": _PLAIN | {"ffn_up": "mlp.gate_up_proj"},
    "command-r": _PLAIN,
    "granite": _PLAIN,
    "olmo2": _ATTENTION | _MLP | _FOUR_NORMS,
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTSIDE = re.compile(r"(\w+)\.(weight|bias)")


def layer_part(name: str) -> tuple[int, str, str] | None:
    """The layer, the part of it, and "weight" or "bias" that a file's name means; None outside of the layers."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2], match[3])


def module_name(architecture: str, name: str) -> str | None:
    """What transformers calls a file's tensor; None for those that it has no module for."""
    if (found := layer_part(name)) is not None:
        number, part, kind = found
        module = NAMES[architecture].get(part)
        return None if module is None else f"model.layers.{number}.{module}.{kind}"
    match = _OUTSIDE.fullmatch(name)
    module = None if match is None else _TOP.get(match[1])
    return None if match is None or module is None else f"{module}.{match[2]}"


def experts_name(layer: int, part: str, expert: int) -> str:
    """What transformers' files call one expert's matrix of a tensor of STACKED."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{STACKED[part]}.weight"
