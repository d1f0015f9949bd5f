"""GGUF files in the torch engine: each architecture against transformers' class, each type against its numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkout import PROSE
from gguf import GGUFWriter
from gguf_models import gemma, lone_logits
from gguf_of_models import Encode, Encoded, write_gguf
from numpy.typing import NDArray
from parity import Pair, caches_of, deviation, run, wanted
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.load.model import build
from tightrope.backends.own_gguf.backend import open_own
from tightrope.backends.own_gguf.inspection import inspect
from tightrope.backends.quant.gguf import BLOCK_TYPES
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.kernels import dispatch, reference

TEXT = 2 * PROSE.read_text("utf-8")
MOST_DIVERGENCE = 0.01  # Nats; llama.cpp rounds inputs of products to 8 bits, ours to 16.
LAYOUTS = {kind.name: kind for kind in TENSOR_TYPES.values()}
F16 = CacheSettings(dtype="f16")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF, the configuration of transformers that it stands for, and what its metadata has more."""

    architecture: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: Callable[[GGUFWriter], None] = lambda _: None
    is_whole_in_llama_cpp: bool = True


def _gemma(writer: GGUFWriter) -> None:
    writer.add_sliding_window(6)


def _gemma2(writer: GGUFWriter) -> None:
    writer.add_sliding_window(6)
    writer.add_attn_logit_softcapping(3.0)
    writer.add_final_logit_softcapping(4.0)


def _granite(writer: GGUFWriter) -> None:
    writer.add_residual_scale(0.3)
    writer.add_attention_scale(0.2)
    writer.add_embedding_scale(3.0)
    writer.add_logit_scale(2.0)


def _yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": Family("llama", "llama"),
    "llama, tied, with heads of a size of their own": Family(
        "llama", "llama", {"tie_word_embeddings": True, "head_dim": 20}
    ),
    "llama, yarn": Family(
        "llama",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64,
            }
        },
        _yarn,
    ),
    "mixtral": Family("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen3": Family("qwen3", "qwen3", {"head_dim": 24}),
    "qwen2moe": Family(
        "qwen2moe", "qwen2_moe", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}
    ),
    "qwen3moe": Family("qwen3moe", "qwen3_moe", {**_MOE, "num_experts": 5, "head_dim": 16, "norm_topk_prob": True}),
    "gemma": Family("gemma", "gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Family(
        "gemma2",
        "gemma2",
        {
            "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0, "tie_word_embeddings": True,
        },
        _gemma2,
    ),
    "gemma3": Family(
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        _gemma,
    ),
    "phi3": Family("phi3", "phi3", {"sliding_window": None}),
    "phi3 with a window, which llama.cpp leaves out": Family(
        "phi3", "phi3", {"sliding_window": 10}, lambda w: w.add_sliding_window(10), is_whole_in_llama_cpp=False
    ),
    "command-r": Family(
        "command-r", "cohere", {"tie_word_embeddings": True}, lambda writer: writer.add_logit_scale(0.0625)
    ),
    "granite": Family(
        "granite",
        "granite",
        {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
        _granite,
    ),
    "olmo2": Family("olmo2", "olmo2"),
}  # fmt: skip


def random_model(family: Family) -> PreTrainedModel:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type](**TINY | family.config)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


def pair_of(untouched: PreTrainedModel, path: Path) -> Pair:
    found = inspect(path, ModelSettings())
    return Pair(untouched, build(found.blueprint), found.rope)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in the place of every kernel: it can hold a cache in float32."""
    monkeypatch.setattr(dispatch, "_kernels_for", lambda x: reference)


def prompt(length: int) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_each_architecture_gives_the_logits_of_the_untouched_class(name: str, tmp_path: Path):
    family = FAMILIES[name]
    untouched = random_model(family)

    pair = pair_of(untouched, write_gguf(untouched, family.architecture, tmp_path / "m.gguf", keys=family.keys))

    (got,) = run(pair, caches_of(pair.ours, 1, torch.float32), [prompt(40)], [[40]])
    assert deviation(got, wanted(pair, prompt(40))) < 1e-5


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.is_whole_in_llama_cpp])
def test_llama_cpp_reads_the_same_model_from_the_file(name: str, tmp_path: Path):
    family = FAMILIES[name]
    untouched = random_model(family)
    path = write_gguf(untouched, family.architecture, tmp_path / "m.gguf", keys=family.keys)

    with closing(GGUFBackend(path, ModelSettings(cache=F16, max_model_len=64), lambda share: None)) as theirs:
        logits = lone_logits(theirs, prompt(40).tolist())

    pair = pair_of(untouched, path)
    (ours,) = run(pair, caches_of(pair.ours, 1, torch.float16), [prompt(40)], [[40]])
    assert deviation(ours, logits) < 2e-2  # llama.cpp rounds keys, values, and what it multiplies, to 11 bits


@pytest.mark.slow
def test_gemma_3_says_what_llama_cpp_makes_of_its_file_beyond_its_window():
    sizes = ModelSettings(cache=F16, max_model_len=640, max_num_seqs=1, step_tokens=640)
    with closing(GGUFBackend(gemma(), sizes, lambda share: None)) as theirs:
        token_ids = [2, *theirs.tokenizer.encode(TEXT, parse_special=False, is_start=True)[:599]]
        their_logits = lone_logits(theirs, token_ids).double()

    with closing(open_own(gemma(), sizes, lambda share: None)) as ours:
        our_logits = lone_logits(ours, token_ids).double()

    base, other = our_logits.log_softmax(-1), their_logits.log_softmax(-1)
    assert (base.exp() * (base - other)).sum(-1).mean() < MOST_DIVERGENCE


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}  # K-types have rows of 256 n


def random_blocks(kinds: Sequence[str]) -> tuple[Encode, dict[str, NDArray[np.float32]]]:
    """Encodes matrices as random blocks of the kinds in turn; and what they stand for, by the names in the file."""
    meant: dict[str, NDArray[np.float32]] = {}
    random = np.random.default_rng(5)

    def encode(name: str, values: NDArray[np.float32]) -> Encoded:
        kind = kinds[len(meant) % len(kinds)]
        if values.ndim != 2:
            return values, None
        type_id = gguf.GGMLQuantizationType[kind]
        if kind not in BLOCK_TYPES:
            encoded = gguf.quants.quantize(values, type_id)
        else:
            form = LAYOUTS[kind]
            blocks = random.integers(0, 256, (len(values), values.shape[1] // form.values, form.num_bytes), np.uint8)
            for floats in form.floats:
                size = SPREAD[kind] * random.standard_normal((*blocks.shape[:2], 1))
                blocks[..., floats.start : floats.start + 2] = size.astype(np.float16).view(np.uint8)
            encoded = blocks.reshape(len(values), -1)
        meant[name] = gguf.quants.dequantize(encoded, type_id)
        return encoded, type_id

    return encode, meant


# what makes weights of about 0.1 of random codes and codes of scales
SPREAD = {
    **dict.fromkeys(("Q4_0", "Q4_1"), 0.02), **dict.fromkeys(("Q5_0", "Q5_1"), 0.01), "Q8_0": 0.0015, "Q2_K": 0.008,
    "Q3_K": 0.003, "Q4_K": 0.0004, "Q5_K": 0.0002, "Q6_K": 0.0001, "IQ4_NL": 0.0015, "IQ4_XS": 0.00008,
}  # fmt: skip
MIXTURES = {kind: (kind,) for kind in (*BLOCK_TYPES, "F16", "BF16")} | {
    "Q4_K_M": ("Q4_K", "Q6_K", "Q4_K"),
    "all": (*BLOCK_TYPES, "F16", "BF16", "F32"),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_are_those_of_the_weights_that_blocks_stand_for(
    name: str, is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    untouched = random_model(Family("llama", "llama", {**WIDE, "tie_word_embeddings": is_tied}))
    encode, meant = random_blocks(MIXTURES[name])
    path = write_gguf(untouched, "llama", tmp_path / "m.gguf", encode=encode)
    fill(untouched, meant)

    pair = pair_of(untouched.double(), path)
    exact = wanted(pair, prompt(40))

    (native,) = run(pair, caches_of(pair.ours, 1, torch.float16), [prompt(40)], [[30], *[[1]] * 10])
    assert (native - exact).norm() / exact.norm() < 1e-2  # keys and values are rounded to 11 bits
    monkeypatch.setattr(dispatch, "_kernels_for", lambda x: reference)  # products with packed codes stay native
    (ours,) = run(pair, caches_of(pair.ours, 1, torch.float32), [prompt(40)], [[30], *[[1]] * 10])
    assert (ours - exact).norm() / exact.norm() < 1e-3


def fill(model: PreTrainedModel, meant: Mapping[str, NDArray[np.float32]]) -> None:
    """Give a llama the weights that stand in the file by these names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        called = names.get_name(name, try_suffixes=(".weight",))
        assert called is not None
        if called in meant:
            values = torch.from_numpy(meant[called].copy())
            heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
            if (count := heads.get(name.split(".")[-2].removesuffix("_proj"))) is not None:
                values = values.view(count, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
            parameter.data.copy_(values)


@pytest.mark.usefixtures("exact")
def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path):
    untouched = random_model(FAMILIES["llama"])
    first = write_gguf(untouched, "llama", tmp_path / "m.gguf", part_tensors=7)
    assert len(list(tmp_path.iterdir())) > 2

    pair = pair_of(untouched, first)

    (got,) = run(pair, caches_of(pair.ours, 1, torch.float32), [prompt(20)], [[20]])
    assert deviation(got, wanted(pair, prompt(20))) < 1e-5


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.usefixtures("exact")
def test_a_factor_for_each_frequency_is_read_from_its_tensor(tmp_path: Path):
    untouched = random_model(Family("llama", "llama", {"rope_parameters": LLAMA3}))
    plain = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    turned = untouched.model.rotary_emb.inv_freq.double().numpy()
    assert not np.allclose(plain, turned)
    factors = {"rope_freqs.weight": (plain / turned).astype(np.float32)}

    pair = pair_of(untouched, write_gguf(untouched, "llama", tmp_path / "m.gguf", extra=factors))

    (got,) = run(pair, caches_of(pair.ours, 1, torch.float32), [prompt(40)], [[40]])
    assert deviation(got, wanted(pair, prompt(40))) < 1e-5


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("length", [20, 40])
def test_long_chats_have_the_factors_for_long_ones(length: int, tmp_path: Path):
    short, long = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
    section = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": short, "long_factor": long}
    section["original_max_position_embeddings"] = 32
    config = {"rope_parameters": section, "original_max_position_embeddings": 32, "sliding_window": None}
    untouched = random_model(Family("phi3", "phi3", config))
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}

    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(256 / 32) / math.log(32)))

    path = write_gguf(
        untouched, "phi3", tmp_path / "m.gguf", keys=keys,
        extra={name: np.asarray(values, np.float32) for name, values in tensors.items()},
    )  # fmt: skip
    pair = pair_of(untouched, path)

    (got,) = run(pair, caches_of(pair.ours, 1, torch.float32), [prompt(length)], [[length]])
    assert deviation(got, wanted(pair, prompt(length))) < 1e-5
