"""Quantized linears are found, fused, biased and planned for as the files have them."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkout import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.matrices import Matrix, Mixed, Nf4, Quantized
from tightrope.backends.quant.find import find_quantization, weight_bytes
from tightrope.kernels.forms.quantized import dequantize

pytestmark = pytest.mark.quick

MIB = 1 << 20
EXL2, EXL2_5, GPTQ, GPTQ_3, GPTQ_V2, AWQ, NF4, MIXTRAL = (
    "llama-exl2-mixed-h6",
    "llama-untied-exl2-5bit-h8",
    "llama-gptq-4bit-32g-actorder",
    "llama-untied-gptq-3bit-32g",
    "llama-untied-gptq-v2-4bit-32g-actorder-asym",
    "llama-awq-4bit-32g",
    "llama-untied-bnb-nf4",
    "mixtral-gptq-4bit-32g-actorder",
)
QKV, DOWN = "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"

Tensors = dict[str, Tensor]


def load(folder: Path) -> LoadedModel:
    return build(draw(folder, read_config(folder), Checkpoint.open(folder)))


def changed(
    name: str, folder: Path, change: Callable[[Tensors], None] = lambda tensors: None, **config: object
) -> Path:
    """A copy of a checkpoint with other tensors and other fields of config.json; None takes a field away."""
    shutil.copytree(TINY / name, folder, dirs_exist_ok=True)
    path = next(folder.glob("*.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


def linears(model: LoadedModel) -> list[Linear]:
    return [module for module in model.tree.modules() if isinstance(module, Linear)]


def expanded(weight: Matrix) -> Tensor:
    """[K, N] float32."""
    if isinstance(weight, Tensor):
        return weight.float().t()
    if isinstance(weight, Mixed):
        return torch.cat([expanded(part) for part in weight.parts], 1)
    assert isinstance(weight, Quantized | Nf4)
    return torch.cat([dequantize(matrix) for matrix in weight.matrices], 1)


def all_weights(model: LoadedModel) -> list[Tensor]:
    return [expanded(linear.weight) for linear in linears(model)]


def are_equal(first: LoadedModel, second: LoadedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(all_weights(first), all_weights(second), strict=True))


@pytest.mark.parametrize("name", [EXL2, GPTQ, AWQ, NF4, MIXTRAL])
def test_several_threads_load_what_one_does(name: str):
    folder = TINY / name
    shape = read_config(folder)
    shares: list[float] = []

    several = build(draw(folder, shape, Checkpoint.open(folder)), shares.append, num_threads=4)

    assert are_equal(several, load(folder))
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_what_is_wrong_with_a_tensor_is_told_from_any_thread(tmp_path: Path):
    def spoil(tensors: Tensors) -> None:
        tensors[f"{DOWN}.scales"][0, 0] = torch.nan

    folder = changed(GPTQ, tmp_path, spoil)

    with pytest.raises(BackendError, match=f"tensor '{DOWN}.scales' holds NaN"):
        build(draw(folder, read_config(folder), Checkpoint.open(folder)), num_threads=4)


@pytest.mark.parametrize("name", [EXL2, GPTQ, AWQ])
def test_a_format_is_told_by_tensors_where_nothing_else_tells(tmp_path: Path, name: str):
    folder = changed(name, tmp_path, quantization_config=None)
    (folder / "quantize_config.json").unlink(missing_ok=True)

    assert are_equal(load(folder), load(TINY / name))


def test_settings_beside_config_json_say_how_zero_points_are_stored(tmp_path: Path):
    folder = changed(GPTQ_V2, tmp_path, quantization_config=None)  # quantize_config.json says gptq_v2

    assert are_equal(load(folder), load(TINY / GPTQ_V2))
    (folder / "quantize_config.json").unlink()
    assert not are_equal(load(folder), load(TINY / GPTQ_V2))


def test_plain_weights_that_are_to_be_quantized_at_load_are_served_as_they_are(tmp_path: Path):
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    def plain(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            module = name.removesuffix(".qweight")
            outputs, inputs = tensors[f"{module}.scales"].shape[1], len(tensors[name])
            for part in ("qweight", "qzeros", "scales"):
                del tensors[f"{module}.{part}"]
            tensors[f"{module}.weight"] = torch.ones(outputs, inputs, dtype=torch.bfloat16)

    folder = changed(AWQ, tmp_path, plain, quantization_config=quantization)
    loaded = load(folder)
    assert all(isinstance(linear.weight, Tensor) for linear in linears(loaded))
    assert not any("bits per weight" in note for note in loaded.notes)


def test_groups_follow_the_inputs_where_g_idx_is_missing_or_zero(tmp_path: Path):
    def without(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    def zeroed(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".g_idx"):
                tensors[name].zero_()

    for change in (without, zeroed):
        assert are_equal(load(changed(GPTQ_3, tmp_path / change.__name__, change)), load(TINY / GPTQ_3))


def test_a_group_size_of_one_linear_alone_is_told_by_its_scales(tmp_path: Path):
    def halved(tensors: Tensors) -> None:
        for part in ("scales", "qzeros"):
            tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"].repeat_interleave(2, 0)
        del tensors[f"{DOWN}.g_idx"]

    assert are_equal(load(changed(GPTQ_3, tmp_path, halved)), load(TINY / GPTQ_3))


def test_zero_biases_are_dropped_and_others_added_to_their_part_of_a_fused_linear(tmp_path: Path):
    def biased(tensors: Tensors) -> None:
        tensors[f"{QKV}.k_proj.bias"] = torch.arange(64).half()

    plain, model = load(TINY / GPTQ), load(changed(GPTQ, tmp_path, biased))

    assert all(linear.bias is None for linear in linears(plain))
    (bias,) = [linear.bias for linear in linears(model) if linear.bias is not None]
    assert torch.equal(bias, torch.cat((torch.zeros(128), torch.arange(64.0), torch.zeros(64))))


def test_a_projection_that_was_left_as_it_was_joins_quantized_ones(tmp_path: Path):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).half()

    def left(tensors: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{QKV}.k_proj.{part}"]
        tensors[f"{QKV}.k_proj.weight"] = weight

    linear = linears(load(changed(AWQ, tmp_path, left)))[0]
    reference = linears(load(TINY / AWQ))[0]

    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    wanted = reference.run(x)
    wanted[:, 128:192] = x @ weight.float().t()
    torch.testing.assert_close(linear.run(x), wanted, atol=1e-3, rtol=1e-4)


def test_projections_with_inputs_in_the_same_order_become_one_matrix():
    qkv = linears(load(TINY / GPTQ))[0].weight

    assert isinstance(qkv, Quantized)
    assert [matrix.num_outputs for matrix in qkv.matrices] == [256]


def test_projections_that_the_converter_split_are_fused_again(tmp_path: Path):
    """Phi-3 fuses qkv_proj and gate_up_proj; EXL2 files have their parts."""
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    folder = changed(EXL2_5, tmp_path, **config)

    assert are_equal(load(folder), load(TINY / EXL2_5))


def test_each_expert_is_a_matrix_of_its_own():
    (first, _) = [module for module in load(TINY / MIXTRAL).tree.modules() if isinstance(module, Experts)]

    assert len(first.gate_up) == len(first.down) == 4
    assert all(isinstance(matrix, Quantized) for matrix in (*first.gate_up, *first.down))


def test_a_linear_whose_tensors_are_in_two_files_is_built_of_both(tmp_path: Path):
    folder = changed(EXL2, tmp_path)
    tensors = load_file(folder / "output.safetensors")
    later = {name: tensor for name, tensor in tensors.items() if name.endswith(("q_weight", "q_scale"))}
    save_file(later, folder / "output-00002-of-00002.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in later}
    save_file(rest, folder / "output-00001-of-00002.safetensors")
    (folder / "output.safetensors").unlink()

    assert are_equal(load(folder), load(TINY / EXL2))


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors that a module's attribute holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Quantized | Nf4):
        for matrix in value.matrices:
            yield from (getattr(matrix, name) for name in matrix.__slots__)
    elif isinstance(value, Mixed | list | tuple):
        for part in value.parts if isinstance(value, Mixed) else value:
            yield from tensors_of(part)


def bytes_of(tree: nn.Module) -> int:
    """Bytes of all weights of a loaded model, each counted once."""
    found = {
        id(tensor): tensor.nbytes
        for module in tree.modules()
        for name in ("weight", "bias", "gate_up", "down")
        for tensor in tensors_of(vars(module).get(name, module._parameters.get(name)))
        if isinstance(tensor, Tensor)
    }
    return sum(found.values())


@pytest.mark.parametrize("name", [EXL2, EXL2_5, GPTQ, GPTQ_3, GPTQ_V2, AWQ, NF4, MIXTRAL])
def test_headers_tell_the_bytes_in_memory_within_two_hundredths(name: str):
    folder = TINY / name
    shape, checkpoint = read_config(folder), Checkpoint.open(folder)
    planned = weight_bytes(checkpoint, find_quantization(folder, shape.raw, checkpoint), is_tied=shape.tie_embeddings)

    assert planned == pytest.approx(bytes_of(load(folder).tree), rel=0.02)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def large_gptq(folder: Path) -> Path:
    """Six layers of 4 bits, 50 MB in two files."""
    config = json.loads((TINY / GPTQ_3 / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    config |= sizes | heads | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    linears = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
    linears |= {"mlp.gate_proj": (1024, 4096), "mlp.up_proj": (1024, 4096), "mlp.down_proj": (4096, 1024)}
    table = torch.ones(config["vocab_size"], 1024, dtype=torch.float16)
    for file in range(2):
        tensors = {"model.norm.weight": table[0].clone(), "lm_head.weight": table} if file else {}
        tensors |= {} if file else {"model.embed_tokens.weight": table}
        for layer in range(3 * file, 3 * file + 3):
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.{name}_layernorm.weight": table[0].clone() for name in ("input", "post_attention")}
            for name, (inputs, outputs) in linears.items():
                words = torch.randint(-(1 << 31), 1 << 31, (inputs // 8, outputs)).int()
                tensors[f"{prefix}.{name}.qweight"] = words
                tensors[f"{prefix}.{name}.qzeros"] = torch.full((inputs // 128, outputs // 8), 0x77777777).int()
                tensors[f"{prefix}.{name}.scales"] = torch.ones(inputs // 128, outputs).half()
        save_file(tensors, folder / f"model-{file + 1:05d}-of-00002.safetensors")
    return folder


def test_loading_takes_the_model_and_the_tensors_of_one_linear_at_most(tmp_path: Path):
    folder = large_gptq(tmp_path)
    load(TINY / GPTQ)  # so that libraries and code are in memory
    shape, checkpoint = read_config(folder), Checkpoint.open(folder)
    planned = weight_bytes(checkpoint, find_quantization(folder, shape.raw, checkpoint), is_tied=False)
    largest = max(tensor.num_bytes for tensor in checkpoint.tensors.values())
    before, peak = resident_bytes(), 0

    def progress(share: float) -> None:
        nonlocal peak
        peak = max(peak, resident_bytes())

    build(draw(folder, shape, checkpoint), progress)

    assert planned == pytest.approx(checkpoint.weight_bytes, rel=0.02)
    assert peak - before < planned + 2 * largest + 8 * MIB  # what is made on the way, and the allocator's slack
