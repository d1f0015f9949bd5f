"""Whole checkpoints of every format give the logits that their weights stand for, alone and through the server."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkout import FORMATS
from real_server import RunningServer, run_server
from step_builder import rope_tables, step_of

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import RopeSettings
from tightrope.kernels import dispatch, reference
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

EXPECTED: Mapping[str, list[dict[str, Any]]] = json.loads((FORMATS / "tiny.json").read_text("utf-8"))
SERVED = {
    "llama-exl2-mixed-h6": "EXL2",
    "llama-gptq-4bit-32g-actorder": "GPTQ",
    "llama-awq-4bit-32g": "AWQ",
    "llama-untied-bnb-nf4": "bitsandbytes 4-bit",
    "mixtral-gptq-4bit-32g-actorder": "GPTQ",
}  # and what each is called
PAGES = 2

# Expected logits are float32 sums in another order, printed with five digits; here the cache is float32, too.
AS_FLOAT32 = 1e-3
# The server caches keys and values in 16 bits at most. That rounding alone, with all else in float32, moves these
# logits by 0.0009 to 0.0022, by the reference's kernels as by the server's own; without it, they are off by 0.0003.
AS_HALVES = 3e-3


@pytest.fixture
def reference_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and cache in torch, which can hold float32."""
    for name in ("attention", "store_kv"):
        monkeypatch.setattr(dispatch, name, getattr(reference, name))
    monkeypatch.setattr(dispatch, "decoder_layers", lambda *inputs: None)


def load(folder: Path) -> LoadedModel:
    shape = read_config(folder)
    return build(draw(folder, shape, Checkpoint.open(folder), rope=resolve_rope(shape.raw, RopeSettings(), 0)))


def last_logits(model: LoadedModel, folder: Path, ids: list[int]) -> torch.Tensor:
    """[V] after `ids`, with keys and values in float32."""
    caches = []
    for layer in model.layers:
        cache = LayerCache.allocate(CacheFormat("f16", layer.num_kv_heads, layer.head_dim), PAGES)
        caches.append(replace(cache, key_codes=cache.key_codes.float(), value_codes=cache.value_codes.float()))
    rope = resolve_rope(read_config(folder).raw, RopeSettings(), 0)
    tables = rope_tables(rope, [len(ids)], PAGES)
    rows = torch.tensor([len(ids) - 1])
    return model.forward(caches, torch.tensor(ids), step_of([(0, len(ids))], PAGES), tables, rows)[0]


@pytest.mark.usefixtures("reference_attention")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_checkpoint_gives_the_logits_that_its_weights_stand_for(name: str):
    folder = FORMATS / "tiny" / name
    model = load(folder)

    for prompt in EXPECTED[name]:
        found = last_logits(model, folder, prompt["ids"])

        torch.testing.assert_close(
            found[prompt["top20_ids"]], torch.tensor(prompt["top20_logits"]), atol=AS_FLOAT32, rtol=0
        )


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[str], RunningServer]]:
    """Gives a server for a checkpoint, which is the same each time."""
    with ExitStack() as stack:

        @cache
        def start(name: str) -> RunningServer:
            return stack.enter_context(run_server("--model", str(FORMATS / "tiny" / name), "--kv-cache=f16"))

        yield start


FIRST = "llama-exl2-mixed-h6"  # What a server adds to a model is the same for all; so one is served in the plain run.
EACH = [pytest.param(name, marks=() if name == FIRST else pytest.mark.slow) for name in SERVED]


@pytest.mark.parametrize("name", EACH)
def test_a_server_gives_the_expected_logprobs(serve: Callable[[str], RunningServer], name: str):
    with httpx.Client(timeout=60) as client:
        for prompt in EXPECTED[name]:
            body = {"prompt": prompt["ids"], "max_tokens": 1, "temperature": 0, "logprobs": 5}
            answer = client.post(f"{serve(name).url}/v1/completions", json=body).json()

            found = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
            wanted = prompt["top20_logits"][:5]
            behind = [logit - wanted[0] for logit in wanted]
            assert [logprob - found[0] for logprob in found] == pytest.approx(behind, abs=AS_HALVES)


@pytest.mark.parametrize("name", EACH)
def test_a_server_says_format_bits_and_kernels(serve: Callable[[str], RunningServer], name: str):
    line = next(line for line in serve(name).output.splitlines() if "bits per weight, run by" in line)

    assert SERVED[name] in line
    assert dispatch.describe() in line
