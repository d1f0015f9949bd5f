"""Mixtures of experts in every format: the logits of their weights, batches, adapters on experts, a LimaRP chat."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkout import ADAPTERS
from quantized_experts import PARTS, expanded, quantized
from real_server import RunningServer, run_server
from safetensors.torch import load_file
from test_adapters import EXPECTED, last_logits, noise, open_model, write_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tightrope.backends.hf.modules.experts import Experts
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layer import GatedExperts

MIXTRAL = ADAPTERS / "mixtral-bf16"
PROMPTS = [prompt["ids"] for prompt in EXPECTED["mixtral-bf16"]["prompts"]]
# Activations in 16 bits of fixed point, keys and values in 11 bits, against 24 bits everywhere.
AS_FLOAT32 = 3e-3


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE, which names its experts' linears otherwise, and has a first layer without experts."""
    torch.manual_seed(4)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=3,
        mlp_only_layers=[0], norm_topk_prob=True, initializer_range=0.1, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen") / "plain"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for file in MIXTRAL.glob("tokenizer*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def transformers_logits(folder: Path, ids: list[int]) -> Tensor:
    """[V] after `ids`, of transformers' own class in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


@pytest.fixture(
    scope="module", params=[(model, form) for model in ("mixtral", "qwen3") for form in PARTS], ids=" ".join
)
def folder(request: pytest.FixtureRequest, qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts are quantized."""
    model, form = request.param
    return quantized(MIXTRAL if model == "mixtral" else qwen, form, tmp_path_factory.mktemp(model) / form)


def on_experts(name: str) -> bool:
    """The experts of the layer 1, and all queries."""
    return ("layers.1." in name and ".experts." in name) or "q_proj" in name


def test_quantized_experts_and_their_adapters_give_the_logits_of_the_weights_alone_and_in_one_batch(
    folder: Path, tmp_path: Path
):
    plain = expanded(folder, tmp_path / "plain")
    deltas: dict[str, tuple[Tensor, Tensor]] = {}

    def merge(weights: dict[str, Tensor]) -> None:
        deltas.update(noise(weights, on_experts, rank=4))
        for module, (a, b) in deltas.items():
            weights[f"{module}.weight"] += 2 * b @ a

    merged = expanded(folder, tmp_path / "merged", merge)
    adapter = write_adapter(tmp_path / "adapter", deltas)
    asked = [(ids, name, 1.0) for ids in PROMPTS for name in (None, "mine")]

    with closing(open_model(folder, mine=adapter)) as backend:
        together = last_logits(backend, *asked)
        alone = torch.cat([last_logits(backend, one) for one in asked])

    expected = torch.stack([transformers_logits(merged if name else plain, ids) for ids, name, _ in asked])
    tolerance = AS_FLOAT32 * expected.abs().max().item()
    torch.testing.assert_close(together, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert (expected[0] - expected[1]).abs().max() > 10 * tolerance  # the adapter is seen


def test_experts_left_plain_beside_quantized_ones_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a quantizer leaves them whose calibration never reached them."""
    folder = quantized(MIXTRAL, "gptq", tmp_path / "gptq")
    with closing(open_model(folder)) as backend:
        expected = last_logits(backend, (PROMPTS[0], None, 1.0))
        monkeypatch.setattr(dispatch, "experts", lambda *inputs: None)
        one_by_one = last_logits(backend, (PROMPTS[0], None, 1.0))

    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_only_the_experts_that_a_token_picked_are_multiplied(monkeypatch: pytest.MonkeyPatch):
    poisoned = 0
    with closing(open_model(MIXTRAL)) as backend:
        expected = last_logits(backend, (PROMPTS[0], None, 1.0))
        mixtures = [module for module in backend.runner.model.tree.modules() if isinstance(module, Experts)]
        run: Callable[..., Any] = dispatch.experts

        def watched(x: Tensor, layer: GatedExperts, picked: Tensor, *more: Any) -> Tensor:  # noqa: ANN401
            """Whatever was not picked is no number now."""
            nonlocal poisoned
            module = next(module for module in mixtures if module.whole is layer)
            unused = sorted(set(range(4)) - set(picked.flatten().tolist()))
            poisoned += len(unused)
            kept = module.down[unused].clone()
            module.down[unused] = float("nan")
            out: Tensor = run(x, layer, picked, *more)
            module.down[unused] = kept
            return out

        monkeypatch.setattr(dispatch, "experts", watched)
        chunked = last_logits(backend, (PROMPTS[0], None, 1.0))
        last_logits(backend, (PROMPTS[0][:1], None, 1.0))

    assert poisoned > 0
    assert torch.equal(chunked, expected)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A Mixtral with an adapter on all its linears, its experts' among them, for chats in LimaRP's format."""
    weights = load_file(MIXTRAL / "model.safetensors")
    deltas = noise(weights, lambda name: ".experts." in name or "_proj" in name, rank=4)
    adapter = write_adapter(tmp_path_factory.mktemp("limarp") / "adapter", deltas, lora_alpha=32)
    with run_server(
        str(MIXTRAL), "--kv-cache=f16", "--lora", f"limarp={adapter}", "--chat-template", "limarp-alpaca"
    ) as running:
        yield running


def test_a_mixture_is_served_with_the_expected_logprobs(server: RunningServer):
    for prompt in EXPECTED["mixtral-bf16"]["prompts"]:
        body = {"prompt": prompt["ids"], "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()

        found = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
        wanted = prompt["top20_logits"][:5]
        behind = [logit - wanted[0] for logit in wanted]
        assert [logprob - found[0] for logprob in found] == pytest.approx(behind, abs=5e-3)


PERSONAS = "User's Persona: a traveller.\nCharacter's Persona: the keeper of an inn."
CHAT = [
    {"role": "system", "content": PERSONAS},
    {"role": "user", "name": "Ines", "content": "Is there a room?"},
    {"role": "assistant", "name": "Bram", "content": "For the night?"},
    {"role": "user", "name": "Ines", "content": "For two."},
]
LIMARP = (
    f"### Instruction:\n{PERSONAS}\n\n### Input:\nInes: Is there a room?\n\n### Response:\nBram: For the night?\n\n"
    "### Input:\nInes: For two.\n\n### Response: (length = {length})\nBram:"
)


def test_a_limarp_chat_with_a_length_runs_through_the_mixture_and_its_adapter(server: RunningServer):
    def ask(path: str, model: str, **body: object) -> dict[str, Any]:
        sent = {"model": model, "max_tokens": 16, "temperature": 0, "explain": True, **body}
        answer = httpx.post(f"{server.url}{path}", json=sent, timeout=60)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def chat(model: str, length: str) -> dict[str, Any]:
        variables = {"length": length}
        return ask("/v1/chat/completions", model, messages=CHAT, chat_template_kwargs=variables)

    texts = {}
    for model in ("limarp", MIXTRAL.name):
        for length in ("medium", "tiny"):
            answer = chat(model, length)
            prompt = answer["explain"]["prompts"][0]["text"]
            assert prompt.endswith(LIMARP.format(length=length))
            texts[model, length] = answer["choices"][0]["message"]["content"]
            raw = ask("/v1/completions", model, prompt=LIMARP.format(length=length))
            assert raw["choices"][0]["text"].strip() == texts[model, length].strip()
    assert len(set(texts.values())) == 4
    refused = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "limarp", "messages": CHAT, "chat_template_kwargs": {"length": "gigantic"}},
        timeout=60,
    )
    assert refused.status_code == 400
    assert "length should be one of" in refused.json()["error"]["message"]
