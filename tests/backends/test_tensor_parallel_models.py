"""Ranks of a model give the bits of one: every format, family, cache and adapter, in prompts, pieces and batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS, FORMATS
from gguf_of_models import write_gguf
from hf_models import gemma3_bf16, smollm2_bf16
from ranks_in_threads import Ranks, build_ranks, rows_of, stored
from safetensors.torch import load_file
from test_adapter_tables import CONFIGS, adapted
from test_adapters import noise, write_adapter
from test_hf_families import FAMILIES, write
from test_own_gguf import FAMILIES as GGUF_FAMILIES
from test_own_gguf import MIXTURES, WIDE, random_blocks, random_model
from test_own_gguf import Family as GgufFamily
from test_quant_loading import EXL2_5, GPTQ_V2, changed
from torch import Tensor

from tightrope.backends.adapters import AdapterRoom
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import Blueprint, draw
from tightrope.backends.locate import bundled_model
from tightrope.backends.own_gguf.inspection import inspect
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import ModelSettings, RopeSettings
from tightrope.backends.tensor_parallel import Share
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import CacheDtype

PLAIN = ("llama-bf16", "llama-untied-bf16", "mixtral-bf16")
PACKED = tuple(sorted(path.name for path in (FORMATS / "tiny").iterdir() if path.is_dir()))
TABLES = (
    "lora-on-embedding-and-head",
    "lora-on-the-embedding.tied",
    "all-of-their-own.and-norms",
    "single-tokens-of-both",
    "grown.of-its-own",
    "shrunk",
)
# Pieces of two prompts: the first has so many rows that a CPU multiplies them in another way than few.
STEPS = ((40, 33), (19, 20), (1, 1), (1, 2))


def prompts(vocab_size: int, lengths: tuple[int, ...] = (61, 56)) -> list[Tensor]:
    random, known = torch.Generator().manual_seed(4), min(vocab_size, 500)  # A shrunk vocabulary has no more.
    return [torch.randint(1, known, (length,), generator=random) for length in lengths]


def of_folder(folder: Path, count: int) -> Ranks:
    shape = read_config(folder)
    rope, checkpoint = resolve_rope(shape.raw, RopeSettings(), 0), Checkpoint.open(folder)

    def drawn(share: Share) -> Blueprint:
        return draw(folder, shape, checkpoint, rope, share=share)

    return build_ranks(drawn, rope, count)


def assert_same(alone: Ranks, ranks: Ranks, dtype: CacheDtype = "q8") -> None:
    asked = prompts(alone.models[0].vocab_size)

    expected, found = alone.run(asked, STEPS, dtype), ranks.run(asked, STEPS, dtype)

    assert torch.equal(found, expected)
    for layer in range(len(alone.models[0].layers)):
        kept, wanted = stored(ranks, layer), stored(alone, layer)
        assert all(torch.equal(kept[name], tensor) for name, tensor in wanted.items())


def folder_of(name: str) -> Path:
    return ADAPTERS / name if name in PLAIN else FORMATS / "tiny" / name


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("name", [*PLAIN, *PACKED])
def test_ranks_give_the_bits_of_one_in_every_format(name: str, count: int):
    assert_same(of_folder(folder_of(name), 1), of_folder(folder_of(name), count))


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
def test_ranks_that_share_a_head_of_keys_cache_the_same(dtype: CacheDtype):
    assert_same(of_folder(folder_of("llama-bf16"), 1), of_folder(folder_of("llama-bf16"), 4), dtype)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_ranks_give_the_bits_of_one_whatever_order_batches_have(is_wanted: bool):
    dispatch.set_batch_invariant(is_wanted=is_wanted)
    try:
        assert_same(of_folder(folder_of("llama-bf16"), 1), of_folder(folder_of("llama-bf16"), 3))
    finally:
        dispatch.set_batch_invariant(is_wanted=False)


@pytest.mark.parametrize("name", [EXL2_5, GPTQ_V2])
def test_ranks_cut_what_a_model_fuses_where_files_have_its_parts_and_where_they_do_not(name: str, tmp_path: Path):
    """Phi-3 fuses qkv_proj and gate_up_proj, which EXL2's converter splits."""
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    folder = changed(name, tmp_path, fuse if name == GPTQ_V2 else lambda tensors: None, **config)

    assert_same(of_folder(folder, 1), of_folder(folder, 3))


def fuse(tensors: dict[str, Tensor]) -> None:
    """Projections side by side, with the order of inputs of the first."""
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for whole, parts in fused.items():
        for module in sorted({name.rpartition(".")[0] for name in tensors if name.endswith(f".{parts[0]}.qweight")}):
            prefix = module.removesuffix(parts[0])
            for kind in ("qweight", "qzeros", "scales"):
                tensors[f"{prefix}{whole}.{kind}"] = torch.cat([tensors.pop(f"{prefix}{p}.{kind}") for p in parts], 1)
            order, *_ = [tensors.pop(f"{prefix}{part}.g_idx") for part in parts]
            tensors[f"{prefix}{whole}.g_idx"] = order


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_the_bits_of_one_in_every_family(family: str, tmp_path: Path):
    write(FAMILIES[family], tmp_path)
    alone, ranks = of_folder(tmp_path, 1), of_folder(tmp_path, 2)

    assert_same(alone, ranks)
    assert all(gather.calls for gather in ranks.gathers)


def test_more_ranks_than_heads_are_refused_in_a_line(tmp_path: Path):
    write(FAMILIES["llama"], tmp_path)

    with pytest.raises(Exception, match="--tensor-parallel 5: attention is split by heads, and a layer has 4"):
        of_folder(tmp_path, 5)


def assert_same_with_adapter(base: Path, adapter: Path) -> None:
    """Beside a prompt without one."""
    alone, ranks = of_folder(base, 1), of_folder(base, 2)
    for one in (*alone.models, *ranks.models):
        one.adapters.room = AdapterRoom(1 << 30)
        one.adapters.prepare("mine", adapter)()
    asked, using = prompts(alone.models[0].vocab_size), rows_of((0, -1), (0.7, 1.0))
    expected = alone.run(asked, STEPS, adapters=using)

    found = ranks.run(asked, STEPS, adapters=using)

    assert torch.equal(found, expected)
    bare = alone.run(asked, STEPS)
    assert not torch.equal(bare[:, :500], expected[:, :500])


@pytest.mark.parametrize(
    ("model", "part"), [("llama-bf16", "_proj"), ("llama-untied-bf16", ""), ("mixtral-bf16", ".experts.")]
)
def test_ranks_give_the_bits_of_one_with_low_rank_adapters(model: str, part: str, tmp_path: Path):
    weights = load_file(ADAPTERS / model / "model.safetensors")
    deltas = noise(weights, lambda name: part in name and "embed" not in name, rank=5)

    assert_same_with_adapter(ADAPTERS / model, write_adapter(tmp_path / "adapter", deltas))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
@pytest.mark.parametrize("kind", TABLES)
def test_ranks_give_the_bits_of_one_with_tables_and_norms_of_an_adapter(kind: str, tmp_path: Path):
    base = ADAPTERS / ("llama-bf16" if kind.endswith(".tied") else "llama-untied-bf16")
    adapted(base, **CONFIGS[kind]).save_pretrained(str(tmp_path / "adapter"))

    assert_same_with_adapter(base, tmp_path / "adapter")


def of_file(path: Path, count: int) -> Ranks:
    """Of a GGUF file, in the torch engine."""
    rope = inspect(path, ModelSettings()).rope
    return build_ranks(lambda share: inspect(path, ModelSettings(), "cpu", share).blueprint, rope, count)


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_ranks_give_the_bits_of_one_for_gguf_files_of_each_architecture(name: str, tmp_path: Path):
    family = GGUF_FAMILIES[name]
    path = write_gguf(random_model(family), family.architecture, tmp_path / "m.gguf", keys=family.keys)

    assert_same(of_file(path, 1), of_file(path, 2))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_ranks_give_the_bits_of_one_for_each_type_of_blocks(name: str, is_tied: bool, tmp_path: Path):
    model = random_model(GgufFamily("llama", "llama", {**WIDE, "tie_word_embeddings": is_tied}))
    path = write_gguf(model, "llama", tmp_path / "m.gguf", encode=random_blocks(MIXTURES[name])[0])

    assert_same(of_file(path, 1), of_file(path, 3))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("model", [smollm2_bf16, bundled_model, gemma3_bf16])
def test_ranks_of_real_models_give_the_bits_of_one(model: Callable[[], Path], count: int):
    of = of_folder if model().is_dir() else of_file

    assert_same(of(model(), 1), of(model(), count))
