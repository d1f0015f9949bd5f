"""SmolLM2 in the formats that people have: the logits that its files stand for, perplexity near bf16's, and a chat."""

from collections.abc import Iterator
from contextlib import closing
from functools import cache

import openai
import pytest
import torch
from hf_models import smollm2_bf16
from quant_models import WRITERS, smollm2
from quantizers.reading import dequantized
from real_server import run_server
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.english import english_text
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.perplexity import cut_windows, measure

pytestmark = pytest.mark.slow

FORMS = tuple(WRITERS)
WINDOW, NUM_TOKENS = 256, 512
SETTINGS = ModelSettings(max_model_len=512, max_num_seqs=4, cache=CacheSettings(tokens=1024, dtype="f16"))

# Activations in 16 bits of fixed point, keys and values in 11 bits, against 24 bits everywhere.
AS_FLOAT32 = 3e-3

# of bf16's perplexity: a model so small has nothing to spare
MOST = 1.4


@cache
def text() -> str:
    """What no quantizer has calibrated on: the end of the prose."""
    whole = english_text()
    return whole[len(whole) * 3 // 4 :]


def perplexity(backend: Backend) -> float:
    token_ids = backend.tokenizer.encode(text(), parse_special=False, is_start=True)
    return measure(backend, cut_windows(token_ids[:NUM_TOKENS], WINDOW, None), lambda _: None).perplexity


@cache
def perplexities_before() -> tuple[float, float]:
    """Those of bf16, and of the GGUF file that all folders were made from."""
    with (
        closing(HFBackend(smollm2_bf16(), SETTINGS, lambda _: None)) as bf16,
        closing(GGUFBackend(bundled_model(), SETTINGS, lambda _: None)) as gguf,
    ):
        return perplexity(bf16), perplexity(gguf)


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backend(form: str) -> Iterator[HFBackend]:
    with closing(HFBackend(smollm2(form), SETTINGS, lambda _: None)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def twin() -> PreTrainedModel:
    """transformers' own SmolLM2 in float32, to be filled with the weights that a folder stands for."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(smollm2_bf16(), dtype=torch.float32)
    return model


def test_a_folder_gives_the_logits_of_the_weights_it_stands_for(form: str, backend: HFBackend, twin: PreTrainedModel):
    weights = {name: tensor for name, tensor in dequantized(smollm2(form)).items() if not name.endswith(".bias")}
    head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"])
    twin.set_output_embeddings(nn.Linear(*reversed(head.shape), bias=False, device="meta"))
    twin.load_state_dict(weights | {"lm_head.weight": head}, assign=True)
    token_ids = backend.tokenizer.encode(text(), parse_special=False, is_start=True)[:40]
    backend.kv.open(1, token_ids, "")
    assert backend.kv.reserve(1, len(token_ids))
    prompt = backend.forward([Chunk(1, token_ids[:-1], 0, "all")]).clone()
    backend.kv.commit(1, 0, token_ids[:-1])
    step = backend.forward([Chunk(1, token_ids[-1:], len(token_ids) - 1, "last")]).clone()
    backend.kv.close(1, keep=False)

    with torch.inference_mode():
        expected = twin(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    tolerance = AS_FLOAT32 * float(expected.abs().max())
    torch.testing.assert_close(torch.cat((prompt, step)), expected, rtol=0, atol=tolerance)


def test_perplexity_stays_near_that_of_bf16(form: str, backend: HFBackend):
    found, (bf16, gguf) = perplexity(backend), perplexities_before()
    print(f"perplexity of {NUM_TOKENS} tokens: {form} {found:.3f}, bf16 {bf16:.3f}, gguf {gguf:.3f}")

    assert found < MOST * bf16


def test_a_folder_is_served_and_answers_in_a_chat(form: str):
    with (
        run_server(str(smollm2(form)), "--max-model-len", "512") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        (card,) = client.models.list().data
        answer = client.chat.completions.create(
            model=card.id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=24,
        )

    assert form.partition("-")[0] in server.output.lower()
    assert card.id == smollm2(form).name
    assert "Paris" in (answer.choices[0].message.content or "")
