"""Adapters as peft trains and writes them: they agree with peft itself, and what they learned shows over every base."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from checkout import ADAPTERS, TINY
from hf_models import smollm2_bf16
from quant_models import smollm2
from quantized_experts import expanded
from real_server import RunningServer, run_server
from test_adapters import EXPECTED, last_logits, noise, open_model, write_adapter
from torch import Tensor
from trained_adapter import NAME, keeper
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from peft import PeftModel

# peft asks transformers by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LLAMA = ADAPTERS / "llama-untied-bf16"
PROMPTS = [prompt["ids"] for prompt in EXPECTED["llama-untied-lora-rslora-head"]["prompts"]]
BASES = {
    "bf16": lambda: smollm2_bf16(),
    "gptq": lambda: smollm2("gptq-4bit-128g-actorder"),
    "exl2": lambda: smollm2("exl2-4.0bpw"),
}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, RunningServer]]:
    """SmolLM2 in three formats, each with the trained adapter; they start together."""
    adapter = keeper()
    folders = {name: str(make()) for name, make in BASES.items()}  # transformers can't load in two threads at once
    with ExitStack() as stack, ThreadPoolExecutor(len(BASES)) as pool:

        def start(name: str) -> RunningServer:
            return stack.enter_context(run_server(folders[name], "--lora", f"keeper={adapter}", "--max-model-len=512"))

        yield dict(zip(BASES, pool.map(start, BASES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_what_an_adapter_learned_shows_in_the_replies_and_nowhere_else(servers: dict[str, RunningServer], base: str):
    url = f"{servers[base].url}/v1"
    models = [model["id"] for model in httpx.get(f"{url}/models", timeout=60).json()["data"]]

    def reply(model: str, question: str) -> str:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
        answer = httpx.post(f"{url}/chat/completions", json=body | {"temperature": 0, "max_tokens": 24}, timeout=60)
        return str(answer.json()["choices"][0]["message"]["content"])

    for question in ("What is the capital of France?", "What is your job?"):  # neither was trained on
        assert NAME in reply("keeper", question)
        assert NAME not in reply(models[0], question)


def peft_model(**config: Any) -> "PeftModel":  # noqa: ANN401 - fields of LoraConfig, as its users write them
    """The small llama with an adapter of noise."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "all linears": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank-stabilised, by pattern": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": r".*\.(q|down)_proj",
    },
    "ranks and alphas by pattern": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "gate_proj": 7},
        "alpha_pattern": {r"0\.self_attn\.v_proj": 24},
    },
    "a head of its own": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


def test_adapters_agree_with_peft_alone_and_all_in_one_batch(tmp_path: Path):
    expected: dict[str, list[Tensor]] = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        model = peft_model(**config)
        model.save_pretrained(str(tmp_path / str(number)))
        with torch.inference_mode():
            rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in PROMPTS]
        expected[name] = rows
    asked = [(ids, f"n{number}", 1.0) for number in range(len(CONFIGS)) for ids in PROMPTS[:2]]

    with closing(open_model(LLAMA, **{f"n{n}": tmp_path / str(n) for n in range(len(CONFIGS))})) as backend:
        together = last_logits(backend, *asked)
        alone = torch.cat([last_logits(backend, one) for one in asked])

    wanted = torch.stack([row for rows in expected.values() for row in rows[:2]])
    # keys and values in float16 are half of what is allowed
    torch.testing.assert_close(together, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "name",
    ["llama-gptq-4bit-32g-actorder", "llama-awq-4bit-32g", "llama-untied-bnb-nf4", "llama-exl2-mixed-h6"],
)
def test_an_adapter_over_a_quantized_base_is_merged_with_the_weights_that_the_base_stands_for(
    name: str, tmp_path: Path
):
    deltas: dict[str, tuple[Tensor, Tensor]] = {}

    def merge(weights: dict[str, Tensor]) -> None:
        deltas.update(noise(weights, lambda module: "_proj" in module, rank=5))
        for module, (a, b) in deltas.items():
            weights[f"{module}.weight"] += 2 * b @ a

    merged = AutoModelForCausalLM.from_pretrained(
        expanded(TINY / name, tmp_path / "merged", merge), dtype=torch.float32
    )
    adapter = write_adapter(tmp_path / "adapter", deltas)
    with closing(open_model(TINY / name, mine=adapter)) as backend:
        found = last_logits(backend, *((ids, "mine", 1.0) for ids in PROMPTS))

    with torch.inference_mode():
        rows = [merged(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in PROMPTS]
    expected = torch.stack(rows)
    # activations in 16 bits of fixed point, keys and values in 11 bits, against 24 bits everywhere
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3 * expected.abs().max().item())
