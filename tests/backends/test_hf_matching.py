"""What is missing refuses the start, what is left over doesn't, and what is in another format is called by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkout import TINY as CHECKPOINTS
from safetensors.torch import load_file, save_file
from test_hf_loader import TINY, Tensors, assert_close, load, logits, rewrite, write
from torch import Tensor

from tightrope.backends.detect import open_backend, outline
from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.find import FORMATS
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"
INDEX = "model.safetensors.index.json"


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def a_layer(prefix: str) -> Tensors:
    """A whole decoder layer of the tiny model's sizes."""
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
              "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
              "mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
    return {f"{prefix}{name}.weight": noise(*shape) for name, shape in shapes.items()}


LEFT_OVER: list[tuple[str, Tensors, str | None]] = [
    ("scales of a cache of 8 bits", {f"{ATTENTION}.k_scale": noise(1), f"{ATTENTION}.v_scale": noise(1)},
     f"weights: {ATTENTION}.k_scale, {ATTENTION}.v_scale left out"),
    ("scales of projections", {f"{ATTENTION}.k_proj.output_scale": noise(1)}, f"{ATTENTION}.k_proj.output_scale left"),
    ("a value head", {"v_head.summary.weight": noise(64, 64), "v_head.summary.bias": noise(64)}, "v_head.summary."),
    ("layers of its own for several tokens", {"mtp.fc.weight": noise(32, 64)} | a_layer("mtp.layers.0."), "mtp."),
    ("a layer after the last one", a_layer("model.layers.2.") | {"model.layers.2.eh_proj.weight": noise(32, 64)},
     "weights: model.layers.2."),
    ("what sees", {"visual.blocks.0.attn.qkv.weight": noise(300, 300), "multi_modal_projector.fc.weight": noise(9, 9)},
     "weights: multi_modal_projector.fc.weight, visual.blocks.0.attn.qkv.weight left out"),
    ("another head, which is small", {"score.weight": noise(2, 32)}, "weights: score.weight left out"),
    ("what every model computes", {f"{ATTENTION}.rotary_emb.inv_freq": noise(4)}, None),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "note"), [entry[1:] for entry in LEFT_OVER], ids=[entry[0] for entry in LEFT_OVER])
def test_what_is_left_over_is_left_out_with_one_note(tmp_path: Path, tensors: Tensors, note: str | None):
    untouched = write(tmp_path)
    rewrite(tmp_path, lambda there: there.update(tensors))

    model = load(tmp_path)

    assert_close(logits(model, tmp_path), untouched)
    assert len(model.notes) == (0 if note is None else 1)
    assert note is None or note in model.notes[0]


def test_a_note_names_a_few_tensors_and_says_how_many_more_there_are(tmp_path: Path):
    write(tmp_path)
    rewrite(tmp_path, lambda there: there.update({f"model.layers.{i}.self_attn.k_scale": noise(1) for i in range(9)}))

    assert load(tmp_path).notes[0].count("k_scale") == 3
    assert "and 6 more" in load(tmp_path).notes[0]


def test_more_than_a_fiftieth_of_the_bytes_is_another_models(tmp_path: Path):
    write(tmp_path)
    rewrite(tmp_path, lambda there: there.update(a_layer("model.layers.2.")))

    with pytest.raises(BackendError, match=r"model\.layers\.2.* and 6 more have no place .* are \d\d% of all weights"):
        load(tmp_path)


def packed(module: str, **parts: Tensor) -> Callable[[Tensors], None]:
    """A linear with other tensors in the place of its weight."""

    def change(tensors: Tensors) -> None:
        tensors.pop(f"{module}.weight")
        tensors.update({f"{module}.{name.replace('__', '.')}": tensor for name, tensor in parts.items()})

    return change


WORDS = torch.ones(4, 4, dtype=torch.int32)
BYTES = torch.ones(4, 4, dtype=torch.uint8)
FP8 = torch.ones(48, 32).to(torch.float8_e4m3fn)
GATE = f"{MLP}.gate_proj"
PACKINGS: list[tuple[str, Callable[[Tensors], None]]] = [
    ("EXL3", packed(GATE, trellis=WORDS.short(), suh=noise(4).half(), svh=noise(4).half())),
    ("QTIP", packed(GATE, trellis=WORDS.short(), SU=noise(4), SV=noise(4))),
    ("HQQ", packed(GATE, W_q=BYTES, scale=noise(4), zero=noise(4))),
    ("compressed-tensors", packed(GATE, weight_packed=WORDS, weight_scale=noise(4), weight_shape=torch.ones(2))),
    ("NVFP4", packed(GATE, weight_packed=BYTES, weight_scale=noise(4), weight_global_scale=noise(1))),
    ("NVFP4 or fp8 of ModelOpt", packed(GATE, weight=BYTES, weight_scale=noise(4), weight_scale_2=noise(1))),
    ("MLX", packed(GATE, weight=WORDS.to(torch.uint32), scales=noise(4, 4), biases=noise(4, 4))),
    ("AQLM", packed(GATE, codes=BYTES, codebooks=noise(4), scales=noise(4))),
    ("QuIP#", packed(GATE, Qidxs=WORDS.long(), SU=noise(4), SV=noise(4))),
    ("VPTQ", packed(GATE, indices=WORDS, centroids__weight=noise(4, 4))),
    ("SqueezeLLM", packed(GATE, qweight=WORDS, lookup_table=noise(4, 4))),
    ("SpQR", packed(GATE, dense_weights=WORDS, row_offsets=WORDS.clone())),
    ("bitsandbytes' 8 bits", packed(GATE, weight=BYTES.to(torch.int8), SCB=noise(4))),
    ("EETQ", packed(GATE, weight=BYTES.to(torch.int8), weight_scales=noise(4))),
    ("Quanto", packed(GATE, weight___data=BYTES, weight___scale=noise(4))),
    ("Marlin", packed(GATE, B=WORDS, s=noise(4))),
    ("fp8 in blocks", packed(GATE, weight=FP8, weight_scale_inv=noise(1, 1))),
    ("fp8", packed(GATE, weight=FP8, weight_scale=noise(1))),
    ("integers of 8 bits", packed(GATE, weight=BYTES.to(torch.int8), weight_scale=noise(1))),
    ("MXFP4", lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj_blocks": BYTES})),
    ("EXL3", lambda tensors: tensors.update({f"{GATE}.trellis": WORDS})),  # beside the plain weight
    ("HQQ", lambda tensors: tensors.update({f"{GATE}.W_q": BYTES})),
]  # fmt: skip


@pytest.mark.parametrize(("format", "change"), PACKINGS, ids=[name for name, _ in PACKINGS])
def test_a_packing_that_is_not_read_is_called_by_its_name(
    tmp_path: Path, format: str, change: Callable[[Tensors], None]
):
    write(tmp_path)
    rewrite(tmp_path, change)

    with pytest.raises(BackendError) as caught:
        load(tmp_path)

    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/model.safetensors: tensor '")
    assert f" is of {format}" in line
    names = ", ".join(kind.name for kind in FORMATS)
    assert line.endswith(f", which can't be read; {names} and plain weights can, and GGUF files")


def test_a_method_that_the_config_names_is_part_of_the_line(tmp_path: Path):
    write(tmp_path, quantization_config={"quant_method": "fbgemm_fp8"})
    rewrite(tmp_path, packed(GATE, weight=FP8, weight_scale=noise(1)))

    with pytest.raises(BackendError, match=r"is of fbgemm_fp8 \(fp8\), which can't be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
    ],
)
def test_settings_that_were_left_beside_plain_weights_are_noted(tmp_path: Path, settings: dict[str, object]):
    untouched = write(tmp_path)
    edited(tmp_path, quantization_config=settings)

    model = load(tmp_path)

    assert_close(logits(model, tmp_path), untouched)
    assert model.notes == (
        f"weights: plain, though config.json speaks of {settings['quant_method']}; served as they are",
    )


def test_packed_integers_of_mlx_are_told_by_its_own_field(tmp_path: Path):
    write(tmp_path)
    edited(tmp_path, quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"})
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, 4, dtype=torch.uint32)}))

    with pytest.raises(BackendError, match=rf"tensor '{name}' is of MLX \(packed integers\), which can't be read"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.default.weight", "lora_embedding_A.default"])
def test_an_adapter_that_was_never_merged_is_not_left_out_of_a_model(tmp_path: Path, part: str):
    write(tmp_path)
    name = f"model.layers.0.self_attn.q_proj.{part}"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(1, 2)}))

    with pytest.raises(BackendError, match=rf"tensor '{name}' is of a LoRA adapter that was never merged"):
        load(tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model."])
def test_names_inside_of_another_module_are_shown_beside_what_is_missing(tmp_path: Path, wrapper: str):
    write(tmp_path)
    rewrite(tmp_path, lambda tensors: [tensors.update({wrapper + n: tensors.pop(n)}) for n in list(tensors)] and None)

    with pytest.raises(BackendError, match=rf"'norm.weight' is missing, .*; the files hold '{wrapper}model.norm"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitnet", "quantization_mode": "online"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}},
        {"bits": 4},
    ],
)
def test_a_method_that_means_more_than_how_weights_are_stored_is_refused(tmp_path: Path, settings: dict[str, object]):
    write(tmp_path)
    edited(tmp_path, quantization_config=settings)

    with pytest.raises(BackendError, match=r"are said to be quantized in format .*, and no tensor is in one that can"):
        load(tmp_path)


def shard(folder: Path, **more: str) -> list[str]:
    """Split the folder's file in two, with an index that has `more` entries; returns the names in the second one."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index | more}))
    return names[9:]


def without_groups(folder: Path) -> None:
    quantized("llama-gptq-4bit-32g-actorder")(folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("g_idx")]:
        del tensors[name]
    for name in [name for name in tensors if name.endswith((".scales", ".qzeros"))]:
        tensors[name] = tensors[name][:0]
    save_file(tensors, path)


def test_an_index_that_names_what_nobody_needs_is_noted_and_served(tmp_path: Path):
    untouched = write(tmp_path, tie_word_embeddings=True)
    second = "model-00002-of-00002.safetensors"
    shard(tmp_path, **{"lm_head.weight": second, "mtp.fc.weight": "model-00003-of-00003.safetensors"})

    model = load(tmp_path)

    assert_close(logits(model, tmp_path), untouched)
    assert model.notes == (
        f"weights: {INDEX} names lm_head.weight, mtp.fc.weight, which no file holds and the model doesn't need",
    )


def test_a_shard_that_is_missing_is_named_with_what_was_in_it(tmp_path: Path):
    write(tmp_path)
    names = shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(BackendError) as caught:
        load(tmp_path)

    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/{INDEX}: shard model-00002-of-00002.safetensors is missing, and tensor '")
    assert any(repr(name) in line for name in names)


def test_a_tied_model_may_hold_its_head_and_no_embedding(tmp_path: Path):
    untouched = write(tmp_path, tie_word_embeddings=True)

    def rename(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(tmp_path, rename)

    assert_close(logits(load(tmp_path), tmp_path), untouched)


def test_a_yi_as_it_was_first_uploaded_is_a_llama_with_other_names_and_defaults(tmp_path: Path):
    untouched = write(tmp_path, rope_theta=5_000_000.0, rms_norm_eps=1e-5, num_key_value_heads=4)

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace(".input_layernorm.", ".ln1.").replace(".post_attention_layernorm.", ".ln2.")
            tensors[old] = tensors.pop(name)

    rewrite(tmp_path, rename)
    sizes = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}}
    config = {"model_type": "Yi", "architectures": ["YiForCausalLM"], "torch_dtype": "float32"} | sizes | code
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert_close(logits(load(tmp_path), tmp_path), untouched)


def edited(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def quantized(name: str, **fields: object) -> Callable[[Path], None]:
    """A checked-in checkpoint, with other words in its config."""

    def make(folder: Path) -> None:
        shutil.copytree(CHECKPOINTS / name, folder, dirs_exist_ok=True)
        edited(folder, **fields)

    return make


def plain(change: Callable[[Tensors], object], **fields: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        rewrite(folder, lambda tensors: (change(tensors), None)[1])
        edited(folder, **fields)

    return make


def pointer(folder: Path) -> None:
    write(folder)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 9000000\n")


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("an unknown activation", plain(len, hidden_act="swish9"),
     "config.json: hidden_act is 'swish9', which transformers doesn't know"),
    ("a missing tensor", plain(lambda t: t.pop("model.norm.weight")), "tensor 'model.norm.weight' is missing"),
    ("another shape", plain(len, intermediate_size=40), "has shape [48, 32], by config.json it must be [40, 32]"),
    ("more layers than there are", plain(len, num_hidden_layers=3), "tensor 'model.layers.2."),
    ("fewer layers than there are", plain(len, num_hidden_layers=1), "have no place in the model"),
    ("another dtype", plain(lambda t: t.update({f"{GATE}.weight": torch.ones(48, 32, dtype=torch.int32)})), "is I32"),
    ("a GPTQ of another width", quantized("llama-gptq-4bit-32g-actorder", intermediate_size=384), "it must be"),
    ("an AWQ of another width", quantized("llama-awq-4bit-32g", intermediate_size=384), "it must be"),
    ("an EXL2 of another width", quantized("llama-exl2-mixed-h6", intermediate_size=384), "it must be"),
    ("an nf4 of another width", quantized("llama-untied-bnb-nf4", intermediate_size=384), "it must be"),
    ("a GPTQ without groups", without_groups, "scales' has no group"),
    ("a vocabulary of another size", plain(len, vocab_size=91), "has shape [90, 32], by config.json it must be"),
    ("a pointer", pointer, "tokenizer.json: a git-lfs pointer in place of the file itself"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), [entry[1:] for entry in BROKEN], ids=[entry[0] for entry in BROKEN])
def test_plan_refuses_what_serve_refuses_in_the_same_words(tmp_path: Path, make: Callable[[Path], None], reason: str):
    make(tmp_path)
    settings = ModelSettings(model=str(tmp_path))

    with pytest.raises(BackendError) as planned:
        outline(settings, 4 << 30)
    with pytest.raises(BackendError) as served:
        open_backend(settings, lambda share: None)

    assert reason in str(planned.value)
    assert str(planned.value) == str(served.value)


@pytest.mark.parametrize("make", [plain(len), quantized("llama-gptq-4bit-32g-actorder")])
def test_plan_reads_no_weights(tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch):
    make(tmp_path)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)

    def read(self: Checkpoint, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", read)

    assert outline(ModelSettings(model=str(tmp_path)), 4 << 30).chosen is not None


def test_what_is_left_out_takes_no_memory(tmp_path: Path):
    write(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "more")
    rewrite(tmp_path / "more", lambda there: there.update({"mtp.fc.weight": noise(32, 64)}))

    sizes = {outline(ModelSettings(model=str(tmp_path / name)), 4 << 30).weight_bytes for name in ("plain", "more")}

    assert len(sizes) == 1
