"""From files to a model: every tensor in its place once, and one line about each that has none."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import smollm2_bf16
from safetensors.torch import load_file, save_file
from step_builder import rope_tables, step_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config, PreTrainedModel

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import RopeSettings
from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

Tensors = dict[str, Tensor]
MIB = 1 << 20

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
PROMPT = torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(1))


def write(folder: Path, model_type: str = "llama", dtype: str = "float32", **config: object) -> PreTrainedModel:
    """A random model in `folder`; the one returned computes in float32 with the same weights."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(TINY | config)))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model.float().eval()


def load(
    folder: Path, rope: RopeSettings | None = None, progress: Callable[[float], None] = lambda share: None
) -> LoadedModel:
    shape = read_config(folder)
    specs = resolve_rope(shape.raw, rope or RopeSettings(), 0)
    return build(draw(folder, shape, Checkpoint.open(folder), rope=specs), progress)


def logits(model: LoadedModel, folder: Path, ids: Tensor = PROMPT, rope: RopeSettings | None = None) -> Tensor:
    """Logits of one prompt, with a 16-bit cache."""
    pages = -(-len(ids) // PAGE)
    formats = [CacheFormat("f16", layer.num_kv_heads, layer.head_dim) for layer in model.layers]
    caches = [LayerCache.allocate(format, pages) for format in formats]
    tables = rope_tables(resolve_rope(read_config(folder).raw, rope or RopeSettings(), 0), [len(ids)], pages)
    return model.forward(caches, ids, step_of([(0, len(ids))], pages), tables, torch.arange(len(ids)))


def assert_close(got: Tensor, untouched: PreTrainedModel, ids: Tensor = PROMPT) -> None:
    """Equal but for keys and values that the cache rounds to 11 bits."""
    with torch.no_grad():
        want = untouched(ids.unsqueeze(0)).logits[0]
    assert ((got - want).abs().max() / want.abs().max()).item() < 3e-3


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a folder's one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_stay_in_the_dtype_of_the_file_and_norms_become_float32(tmp_path: Path, dtype: str):
    untouched = write(tmp_path, "qwen3", dtype, head_dim=16)

    model = load(tmp_path)

    assert_close(logits(model, tmp_path), untouched)
    dtypes = {type(module).__name__: {tensor.dtype for tensor in vars(module).values() if isinstance(tensor, Tensor)}
              for module in model.tree.modules()}  # fmt: skip
    assert dtypes["Linear"] == dtypes["Embedding"] == {getattr(torch, dtype)}
    assert dtypes["RMSNorm"] == {torch.float32}


def test_projections_of_different_dtypes_are_fused_in_float32(tmp_path: Path):
    untouched = write(tmp_path)

    def halve(tensors: Tensors) -> None:
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors[name] = tensors[name].bfloat16()
        untouched.load_state_dict({name: tensors[name].float()}, strict=False)

    rewrite(tmp_path, halve)

    assert_close(logits(load(tmp_path), tmp_path), untouched)


def test_rotary_frequencies_of_old_files_are_ignored(tmp_path: Path):
    untouched = write(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))

    assert_close(logits(load(tmp_path), tmp_path), untouched)


def test_names_without_the_base_model_s_prefix_are_found(tmp_path: Path):
    untouched = write(tmp_path, tie_word_embeddings=True)

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path, strip)

    assert_close(logits(load(tmp_path), tmp_path), untouched)


@pytest.mark.parametrize("names", ["fused", "split"])
def test_experts_are_found_fused_and_one_by_one(tmp_path: Path, names: str):
    untouched = write(tmp_path, "mixtral", **EXPERTS)

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if "block_sparse_moe" in name]:
            del tensors[name]
        fused = {name: tensor.clone() for name, tensor in untouched.state_dict().items() if ".mlp." in name}
        for name, tensor in fused.items():
            if names == "fused" or "experts" not in name:
                tensors[name] = tensor
                continue
            prefix, kind = name.rsplit(".", 1)
            for expert, rows in enumerate(tensor):
                if kind == "down_proj":
                    tensors[f"{prefix}.{expert}.down_proj.weight"] = rows
                else:
                    gate, up = rows.chunk(2)
                    tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                    tensors[f"{prefix}.{expert}.up_proj.weight"] = up

    rewrite(tmp_path, rename)

    assert_close(logits(load(tmp_path), tmp_path), untouched)


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_tied_head_that_the_file_holds_too_is_shared_only_if_equal(tmp_path: Path, is_equal: bool):
    untouched = write(tmp_path, tie_word_embeddings=True)
    table = untouched.state_dict()["model.embed_tokens.weight"]
    head = table.clone() if is_equal else table.roll(1, 0)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    untouched.lm_head.weight = torch.nn.Parameter(head)

    model = load(tmp_path)

    assert_close(logits(model, tmp_path), untouched)
    assert [note.split()[0] for note in model.notes] == ([] if is_equal else ["lm_head.weight"])
    weights = [vars(module).get("weight", head[:1]) for module in model.tree.modules()]
    assert len({weight.data_ptr() for weight in weights if len(weight) == len(head)}) == (1 if is_equal else 2)


@pytest.mark.parametrize("nest", ["language_model.model.", "model.language_model.", "model.text_model."])
def test_the_language_model_is_taken_out_of_one_that_also_sees(tmp_path: Path, nest: str):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TINY | {"head_dim": 16, "sliding_window": 6}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(3)
    untouched = AutoModelForCausalLM.from_config(config).eval()
    untouched.save_pretrained(tmp_path)

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("language_model.model.")]:
            tensors[name.replace("language_model.model.", nest)] = tensors.pop(name)

    rewrite(tmp_path, rename)

    assert_close(logits(load(tmp_path), tmp_path), untouched)


def test_a_class_that_is_kept_rotates_by_the_settings(tmp_path: Path):
    settings = RopeSettings(kind="linear", factor=4.0)
    rotation = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    write(tmp_path / "plain", "gpt_neox", rope_parameters=rotation | {"rope_type": "default"})
    scaled = write(tmp_path / "scaled", "gpt_neox", rope_parameters=rotation)

    model = load(tmp_path / "plain", settings)

    assert_close(logits(model, tmp_path / "plain", rope=settings), scaled)


def test_two_models_in_one_process_keep_their_steps_apart(tmp_path: Path):
    first = write(tmp_path / "first", "phi")
    second = write(tmp_path / "second", "llama", num_hidden_layers=3)

    models = load(tmp_path / "first"), load(tmp_path / "second")
    got = logits(models[0], tmp_path / "first"), logits(models[1], tmp_path / "second")

    assert_close(got[0], first)
    assert_close(got[1], second)
    assert_close(logits(models[0], tmp_path / "first"), first)


def set_value(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def replace_tensor(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), f"tensor '{DOWN}' is missing"),
        (lambda tensors: tensors.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
        (
            replace_tensor("model.extra", torch.ones(3000)),
            "model.safetensors: model.extra have no place in the model that config.json describes, and are",
        ),
        (
            replace_tensor(DOWN, torch.ones(48, 32)),
            f"tensor '{DOWN}' has shape [48, 32], by config.json it must be [32, 48]",
        ),
        (
            replace_tensor(DOWN, torch.ones(32, 48, dtype=torch.int32)),
            f"tensor '{DOWN}' is I32; BF16, F16, F32 can be loaded",
        ),
        (set_value(DOWN, float("nan")), f"tensor '{DOWN}' holds NaN"),
        (set_value("model.norm.weight", float("inf")), "tensor 'model.norm.weight' holds an infinite value"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(
    tmp_path: Path, change: Callable[[Tensors], None], message: str
):
    write(tmp_path)
    rewrite(tmp_path, change)

    with pytest.raises(BackendError) as error:
        load(tmp_path)

    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("gpt_oss", {"layer_types": ["full_attention"] * 2, **EXPERTS}, "its attention takes s_aux"),
        ("bert", {}, "its attention is neither causal nor a sliding window"),
        ("recurrent_gemma", {"lru_width": 32}, "its layers keep a state beside keys and values"),
    ],
)
def test_a_model_that_the_cache_cannot_hold_is_refused(
    tmp_path: Path, model_type: str, config: dict[str, object], reason: str
):
    write(tmp_path, model_type, **config)

    with pytest.raises(BackendError, match=reason):
        load(tmp_path)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_loading_takes_the_model_and_one_shard_at_most():
    folder = smollm2_bf16()
    load(folder)  # so that libraries and code are in memory
    checkpoint = Checkpoint.open(folder)
    largest = max(sum(checkpoint.tensors[name].num_bytes for name in shard.names) for shard in checkpoint.shards())
    before, peak, shares = resident_bytes(), 0, []

    def progress(share: float) -> None:
        nonlocal peak
        peak = max(peak, resident_bytes())
        shares.append(share)

    load(folder, progress=progress)

    assert largest < checkpoint.weight_bytes / 2
    assert peak - before < checkpoint.weight_bytes + largest + 16 * MIB  # norms in float32, and the allocator's slack
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_bundled_model_has_the_logits_of_transformers():
    folder = smollm2_bf16()
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(300, 420)

    got = logits(load(folder), folder, ids)

    with torch.no_grad():
        want = untouched(ids.unsqueeze(0)).logits[0]
    assert ((got - want).norm() / want.norm()).item() < 1e-3
    assert got[-1].argmax() == want[-1].argmax()
