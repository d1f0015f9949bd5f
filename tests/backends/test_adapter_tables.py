"""Adapters of embeddings, heads, norms and grown vocabularies: the logits of peft, alone and mixed in one batch."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkout import ADAPTERS, TINY
from quantized_experts import expanded
from test_adapters import last_logits, open_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from peft import PeftModel

# peft asks transformers by an older name, and warns of what these tests are about
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]

BASES = {
    "tied": ADAPTERS / "llama-bf16",
    "untied": ADAPTERS / "llama-untied-bf16",
    "nf4": TINY / "llama-untied-bnb-nf4",
}
PROMPTS = [[5, 9, 33, 101, 7, 250], [40, 3, 7, 7, 90]]
NEW = [513, 515]  # tokens of a vocabulary that grew by GROWN, from 512
GROWN = 5

LINEARS = ["q_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora-on-the-embedding": {"target_modules": [*LINEARS, "embed_tokens"]},
    "lora-on-embedding-and-head": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "lora-on-the-embedding.tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "an-embedding-of-its-own": {"target_modules": LINEARS, "modules_to_save": ["embed_tokens"]},
    "an-embedding-of-its-own.tied": {
        "target_modules": LINEARS,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "all-of-their-own.and-norms": {"target_modules": LINEARS, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "single-tokens": {"target_modules": LINEARS, "trainable_token_indices": [7, 3]},
    "single-tokens-of-both": {
        "target_modules": LINEARS,
        "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [40]},
    },
    "grown.as-they-are": {"target_modules": LINEARS, "resize": GROWN},
    "grown.lora-on-both": {"target_modules": ["embed_tokens", "lm_head"], "resize": GROWN},
    "grown.of-its-own": {"target_modules": LINEARS, "modules_to_save": ["embed_tokens", "lm_head"], "resize": GROWN},
    "grown.single-tokens": {"target_modules": LINEARS, "trainable_token_indices": NEW, "resize": GROWN},
    "shrunk": {"target_modules": LINEARS, "modules_to_save": ["embed_tokens", "lm_head"], "resize": -12},
}


def adapted(base: Path, *, resize: int = 0, **config: Any) -> "PeftModel":  # noqa: ANN401 - fields of LoraConfig
    """A model with an adapter whose numbers are all a little off those that peft begins with."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(model.config.vocab_size + resize)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_", "modules_to_save", "trainable_tokens")):
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def logits_of(model: "PeftModel", prompts: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        return torch.stack([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prompts])


def close(found: Tensor, wanted: Tensor) -> None:
    """Keys and values in float16 are half of what is allowed. What `wanted` hasn't can't be drawn."""
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert found[:, wanted.shape[1] :].isneginf().all()


def plain(base: Path, folder: Path) -> Path:
    """The weights that a quantized base stands for, as transformers reads them."""
    return base if "quantization_config" not in AutoConfig.from_pretrained(base).to_dict() else expanded(base, folder)


@pytest.mark.parametrize("kind", BASES)
def test_adapters_of_embeddings_heads_and_norms_agree_with_peft_in_one_batch(kind: str, tmp_path: Path):
    base = plain(BASES[kind], tmp_path / "plain")
    wanted: dict[str, tuple[list[list[int]], Tensor]] = {}
    for name, config in CONFIGS.items():
        if config.get("ensure_weight_tying") and kind != "tied":
            continue
        model = adapted(base, **config)
        model.save_pretrained(str(tmp_path / name))
        prompts = [*PROMPTS, [7, NEW[0], 9, NEW[1]]] if config.get("resize", 0) > 0 else PROMPTS
        wanted[name] = prompts, logits_of(model, prompts)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = [(ids, name, 1.0) for name, (prompts, _) in wanted.items() for ids in prompts]

    with closing(open_model(BASES[kind], **{name: tmp_path / name for name in wanted})) as backend:
        alone = {name: last_logits(backend, *((i, name, 1.0) for i in ids)) for name, (ids, _) in wanted.items()}
        together = last_logits(backend, *asked, *((ids, None, 1.0) for ids in PROMPTS))
        nothing = last_logits(backend, *((PROMPTS[0], name, 0.0) for name in wanted))

    row = 0
    for name, (prompts, rows) in wanted.items():
        close(alone[name], rows)
        close(together[row : row + len(prompts)], rows)
        row += len(prompts)
    theirs = logits_of(bare, PROMPTS)
    close(together[row:], theirs)
    for name, logits in zip(wanted, nothing, strict=True):
        size = min(512, 512 + CONFIGS[name].get("resize", 0))
        torch.testing.assert_close(logits[:size], theirs[0][:size], rtol=0, atol=1e-3 * theirs.abs().max().item())


FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "norms of heads": (
        {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
        ["q_norm", "k_norm", "input_layernorm"],
    ),
    "one in the weight, an embedding with a scale": (
        {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"},
        ["pre_feedforward_layernorm", "post_attention_layernorm", "norm", "embed_tokens"],
    ),
    "layer norms with a bias": ({"model_type": "stablelm"}, ["input_layernorm", "norm"]),
    "layer norms of another tree": (
        {"model_type": "gpt_neox", "rotary_pct": 0.5},
        ["input_layernorm", "final_layer_norm"],
    ),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_norms_of_families_agree_with_peft_beside_rows_without(kind: str, tmp_path: Path):
    config, saved = FAMILIES[kind]
    base = tmp_path / "base"
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "eos_token_id": 2}
    bare = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | config), dtype=torch.float32).eval()
    for name, parameter in bare.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    bare.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((ADAPTERS / "llama-bf16" / name).read_bytes())
    linears = ["query_key_value"] if config["model_type"] == "gpt_neox" else ["q_proj"]
    model = adapted(base, target_modules=linears, modules_to_save=saved)
    model.save_pretrained(str(tmp_path / "adapter"))
    wanted, theirs = logits_of(model, PROMPTS), logits_of(bare, PROMPTS)

    with closing(open_model(base, mine=tmp_path / "adapter")) as backend:
        found = last_logits(backend, *((ids, name, 1.0) for name in ("mine", None) for ids in PROMPTS))

    assert (wanted - theirs).abs().max() > 0.02 * wanted.abs().max()
    close(found, torch.cat([wanted, theirs]))
