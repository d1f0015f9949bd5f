"""Model folders that hold headers only: sizes of real models without a byte of their weights."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Tensor = tuple[str, str, list[int]]  # name, safetensors dtype, shape
Linear = Callable[[str, int, int], Iterator[Tensor]]  # Of a module's name, outputs and inputs.
WIDTHS = {"BF16": 2, "F16": 2, "I16": 2, "I32": 4, "F32": 4, "U8": 1}
STATE = "weight.quant_state.bitsandbytes__nf4"

YI_34B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 60,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
    "max_position_embeddings": 4096,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def write_folder(
    folder: Path, config: dict[str, object], tensors: list[Tensor], contents: Mapping[str, bytes] | None = None
) -> Path:
    """A folder with config.json and one sparse safetensors file: as long as it claims, and nearly nothing on disk.

    contents: of those tensors that aren't all zero.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    end = 0
    for name, dtype, shape in tensors:
        size = WIDTHS[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, content in (contents or {}).items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])  # type: ignore[index]
            file.write(content)
        file.truncate(8 + len(text) + end)
    return folder


def yi_34b(folder: Path, bits_per_weight: float = 4.65, layers: int = 60) -> Path:
    """Yi-34B in EXL2: its linears at about that many bits a weight, 4 to 5; the head has 6, the embedding 16."""
    config = YI_34B | {"num_hidden_layers": layers}
    return write_folder(folder, config, list(_yi_tensors(bits_per_weight, layers)))


def _yi_tensors(bits_per_weight: float, layers: int) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", "F16", [64000, 7168]
    linears = {"q": (7168, 7168), "k": (1024, 7168), "v": (1024, 7168), "o": (7168, 7168)}
    linears |= {"gate": (20480, 7168), "up": (20480, 7168), "down": (7168, 20480)}
    for layer in range(layers):
        for name, (outputs, inputs) in linears.items():
            block = "mlp" if name in ("gate", "up", "down") else "self_attn"
            yield from _exl2(f"model.layers.{layer}.{block}.{name}_proj", outputs, inputs, bits_per_weight)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", "F16", [7168]
    yield "model.norm.weight", "F16", [7168]
    yield from _exl2("lm_head", 64000, 7168, 6)


def _exl2(module: str, outputs: int, inputs: int, bits_per_weight: float) -> Iterator[Tensor]:
    """Groups of 128 rows at 5 bits, and then at 4; a scale takes 4 bits for each of a group's outputs."""
    groups = inputs // 128
    wide = round((bits_per_weight - 4 / 128 - 4) * groups)
    yield f"{module}.q_weight", "I32", [(4 * groups + wide) * 128 // 32, outputs]
    yield f"{module}.q_scale", "I32", [groups, outputs // 8]
    yield f"{module}.q_scale_max", "F16", [groups]
    yield f"{module}.q_groups", "I16", [2 * groups]
    yield f"{module}.q_invperm", "I32", [inputs]


LLAMA_33B = YI_34B | {
    "hidden_size": 6656,
    "intermediate_size": 17920,
    "num_attention_heads": 52,
    "num_key_value_heads": 52,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def gptq(folder: Path, config: dict[str, object]) -> Path:
    """A dense model of these sizes in GPTQ of 4 bits, groups of 128 and act-order; embedding and head have 16."""
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
    return write_folder(folder, config | {"quantization_config": quantization}, list(_dense(config, _gptq)))


def bf16(folder: Path, config: dict[str, object]) -> Path:
    """A dense model of these sizes as it was trained."""
    return write_folder(folder, config | {"torch_dtype": "bfloat16"}, list(_dense(config, _bf16, "BF16")))


def awq(folder: Path, config: dict[str, object]) -> Path:
    """The same in AWQ of 4 bits, groups of 128."""
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return write_folder(folder, config | {"quantization_config": quantization}, list(_dense(config, _awq)))


def nf4(folder: Path, config: dict[str, object]) -> Path:
    """The same in bitsandbytes' nf4."""
    states: dict[str, bytes] = {}

    def linear(module: str, outputs: int, inputs: int) -> Iterator[Tensor]:
        states[f"{module}.{STATE}"] = _state(outputs, inputs)
        return _nf4(module, outputs, inputs)

    tensors = list(_dense(config, linear))
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return write_folder(folder, config | {"quantization_config": quantization}, tensors, states)


def _bf16(module: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "BF16", [outputs, inputs]


def _gptq(module: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield f"{module}.qweight", "I32", [inputs // 8, outputs]
    yield f"{module}.qzeros", "I32", [inputs // 128, outputs // 8]
    yield f"{module}.scales", "F16", [inputs // 128, outputs]
    yield f"{module}.g_idx", "I32", [inputs]


def _awq(module: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield f"{module}.qweight", "I32", [inputs, outputs // 8]
    yield f"{module}.qzeros", "I32", [inputs // 128, outputs // 8]
    yield f"{module}.scales", "F16", [inputs // 128, outputs]


def _state(outputs: int, inputs: int) -> bytes:
    return json.dumps({"shape": [outputs, inputs], "blocksize": 64}).encode()


def _nf4(module: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "U8", [outputs * inputs // 2, 1]
    yield f"{module}.weight.absmax", "F32", [outputs * inputs // 64]
    yield f"{module}.weight.quant_map", "F32", [16]
    yield f"{module}.{STATE}", "U8", [len(_state(outputs, inputs))]


def _dense(config: dict[str, object], linear: Linear, dtype: str = "F16") -> Iterator[Tensor]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    hidden, inner, heads, kv_heads, vocabulary, layers = (int(str(config[n])) for n in (*names, "num_hidden_layers"))
    kv = hidden // heads * kv_heads
    linears = {f"self_attn.{n}": (hidden if n in "qo" else kv, hidden) for n in "qkvo"}
    linears |= {"mlp.gate": (inner, hidden), "mlp.up": (inner, hidden), "mlp.down": (hidden, inner)}
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", dtype, [vocabulary, hidden]
    for layer in range(layers):
        for name, size in linears.items():
            yield from linear(f"model.layers.{layer}.{name}_proj", *size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", dtype, [hidden]
    yield "model.norm.weight", dtype, [hidden]


MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def mixtral_8x7b(folder: Path, *, is_gptq: bool = False, layers: int = 32) -> Path:
    """Mixtral-8x7B in bf16, or its linears in GPTQ of 4 bits in groups of 128."""
    quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}}
    config = MIXTRAL_8X7B | {"num_hidden_layers": layers} | (quantization if is_gptq else {})
    return write_folder(folder, config, list(_mixtral_tensors(is_gptq, layers)))


def _mixtral_tensors(is_gptq: bool, layers: int = 32) -> Iterator[Tensor]:
    def linear(name: str, outputs: int, inputs: int) -> Iterator[Tensor]:
        if not is_gptq:
            yield f"{name}.weight", "BF16", [outputs, inputs]
            return
        yield f"{name}.qweight", "I32", [inputs // 8, outputs]
        yield f"{name}.qzeros", "I32", [inputs // 128, outputs // 8]
        yield f"{name}.scales", "F16", [inputs // 128, outputs]

    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", "BF16", [32000, 4096]
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, outputs in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            yield from linear(f"{layer}.self_attn.{name}_proj", outputs, 4096)
        for e in range(8):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            for name, outputs, inputs in (("w1", 14336, 4096), ("w3", 14336, 4096), ("w2", 4096, 14336)):
                yield from linear(f"{expert}.{name}", outputs, inputs)
        yield f"{layer}.block_sparse_moe.gate.weight", "BF16", [8, 4096]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", "BF16", [4096]
    yield "model.norm.weight", "BF16", [4096]


def mixtral_lora(folder: Path, rank: int) -> Path:
    """An adapter for it, on all linears of attention and experts."""
    pairs = [(name, shape) for name, _, shape in _mixtral_tensors(False) if "self_attn" in name or ".experts." in name]
    tensors: list[Tensor] = []
    for name, (outputs, inputs) in pairs:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors.append((f"{module}.lora_A.weight", "F16", [rank, inputs]))
        tensors.append((f"{module}.lora_B.weight", "F16", [outputs, rank]))
    write_folder(folder, {}, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
