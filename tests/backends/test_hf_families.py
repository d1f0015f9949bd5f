"""Every family against the untouched transformers class, on tiny random models read back from their files.

Parity is measured with the reference kernels and a cache in float32, so that nothing but rounding differs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import PAGES_EACH, Pair, caches_of, deviation, run, wanted
from step_builder import rope_tables, step_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import build
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import RopeSettings
from tightrope.kernels import dispatch, reference

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A model type, its configuration, and the classes of attention, MLPs and norms that it is expected to keep."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    ropes: frozenset[str | None] = frozenset({"default"})  # keys of the tables by which cached keys are rotated


FAMILIES = {
    "llama": Family("llama"),
    "llama, biases and tied head": Family(
        "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 20}
    ),
    "mistral": Family("mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": 9, "layer_types": SLIDING, "num_hidden_layers": 3}
    ),
    "qwen3": Family("qwen3", {"head_dim": 24}),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": SLIDING,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        ropes=frozenset(SLIDING),
    ),
    "phi3": Family("phi3", {"sliding_window": 10, "tie_word_embeddings": False}),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "qwen3_moe": Family(
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe, shared expert": Family(
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1}, kept=("OlmoeAttention",)),
    "ernie4_5_moe, a table beside its router": Family(
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0},
        kept=("Ernie4_5_MoeAttention",),
    ),
    "olmo2, norms after the blocks": Family("olmo2", kept=("Olmo2Attention",)),
    "granite, multipliers": Family(
        "granite",
        {
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3, layers without rotation": Family(
        "smollm3", {"no_rope_layers": [1, 0]}, ropes=frozenset({"default", None})
    ),
    "stablelm, partial rotation": Family("stablelm", {"partial_rotary_factor": 0.5}, kept=("LayerNorm",)),
    "cohere2, interleaved rotation": Family(
        "cohere2", {"sliding_window": 6, "num_hidden_layers": 4}, kept=("Cohere2Attention", "Cohere2LayerNorm")
    ),
    "ministral3, queries scaled by position": Family(
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
            },
        },
        kept=("Ministral3Attention",),
    ),
    "gpt2, positions in a table": Family(
        "gpt2", {"num_key_value_heads": None}, kept=("GPT2Attention", "GPT2MLP", "LayerNorm")
    ),
    "gpt_neox, fused by head": Family(
        "gpt_neox",
        {"rotary_pct": 0.5, "num_key_value_heads": None},
        kept=("GPTNeoXAttention", "GPTNeoXMLP", "LayerNorm"),
    ),
    "phi, partial rotation": Family(
        "phi", {"partial_rotary_factor": 0.5}, kept=("PhiAttention", "PhiMLP", "LayerNorm")
    ),
}


def write(family: Family, folder: Path) -> PreTrainedModel:
    torch.manual_seed(7)
    config = {name: value for name, value in (TINY | family.config).items() if value is not None}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type](**config)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("model")
    untouched = write(request.param, folder)
    shape = read_config(folder)
    rope = resolve_rope(shape.raw, RopeSettings(), 0)
    ours = build(draw(folder, shape, Checkpoint.open(folder), rope=rope))
    return Pair(untouched, ours, rope)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in the place of every kernel: it can hold a cache in float32."""
    monkeypatch.setattr(dispatch, "_kernels_for", lambda x: reference)


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("exact")
def test_a_whole_prompt_gives_the_logits_of_the_untouched_class(pair: Pair):
    caches = caches_of(pair.ours, 1, torch.float32)

    (got,) = run(pair, caches, [prompt(40)], [[40]])

    assert deviation(got, wanted(pair, prompt(40))) < 1e-5


@pytest.mark.usefixtures("exact")
def test_a_prompt_in_chunks_and_a_mixed_batch_give_the_same_logits(pair: Pair):
    prompts = [prompt(33, 1), prompt(27, 2), prompt(9, 3)]
    caches = caches_of(pair.ours, len(prompts), torch.float32)

    got = run(pair, caches, prompts, [[16, 24, 5], [15, 1, 1], [1, 1, 2], [1, 1, 1]])

    assert max(deviation(g, wanted(pair, p)) for g, p in zip(got, prompts, strict=True)) < 1e-5


def test_the_kernels_of_this_machine_with_a_16_bit_cache_stay_close(pair: Pair):
    caches = caches_of(pair.ours, 1, torch.float16)

    (got,) = run(pair, caches, [prompt(30)], [[22], *[[1]] * 8])

    assert deviation(got, wanted(pair, prompt(30))) < 3e-3  # keys and values rounded to 11 bits


def test_only_the_wanted_rows_go_through_the_head(pair: Pair):
    caches = caches_of(pair.ours, 1, torch.float16)
    layout, tables = step_of([(0, 12)], PAGES_EACH), rope_tables(pair.rope, [12], PAGES_EACH)

    every = pair.ours.forward(caches, prompt(12), layout, tables, torch.arange(12))
    some = pair.ours.forward(caches, prompt(12), layout, tables, torch.tensor([3, 11]))
    none = pair.ours.forward(caches, prompt(12), layout, tables, torch.tensor([], dtype=torch.int64))

    torch.testing.assert_close(some, every[[3, 11]], rtol=1e-5, atol=1e-5)
    assert none.shape == (0, TINY["vocab_size"])
    assert every.dtype == torch.float32


def test_our_modules_take_the_place_of_all_that_they_know(pair: Pair, request: pytest.FixtureRequest):
    family = FAMILIES[request.node.callspec.id]

    others = {
        type(module) for module in pair.ours.tree.modules() if not type(module).__module__.startswith("tightrope")
    }
    assert {cls.__name__ for cls in others if cls.__name__.endswith(("Attention", "MLP", "Norm"))} == {*family.kept}
    attention = [name for name in family.kept if name.endswith("Attention")]
    assert [note.split()[0] for note in pair.ours.notes] == attention
    assert {layer.rope for layer in pair.ours.layers} == (frozenset({None}) if attention else family.ropes)


def test_a_model_of_our_modules_alone_runs_without_transformers_own_code(pair: Pair, request: pytest.FixtureRequest):
    caches = caches_of(pair.ours, 1, torch.float16)
    layout, tables = step_of([(0, 12)], PAGES_EACH), rope_tables(pair.rope, [12], PAGES_EACH)
    calls: list[object] = []
    hook = pair.ours.tree.register_forward_pre_hook(lambda *call: calls.append(call))
    pair.ours.forward(caches, prompt(12), layout, tables, torch.arange(12))
    hook.remove()

    does_more = request.node.callspec.id in ("gemma2", "granite, multipliers")  # With the logits.
    assert bool(calls) is (does_more or bool(FAMILIES[request.node.callspec.id].kept))
