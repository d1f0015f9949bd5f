"""What `--matmul-sums float16` costs in exactness: its sums emulated in a real model, all linears and the head."""

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from half_sums import half_sums, largest_error
from hf_models import smollm2_bf16
from safetensors.torch import load_file
from torch import Tensor

from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run.calibrate import TEXT
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.kernels import dispatch, reference

NUM_TOKENS = 96
OPERATIONS = ("store_kv", "attention", "rotate", "linear", "add_low_rank", "rms_norm", "gated")


def logits(backend: HFBackend, token_ids: list[int]) -> Tensor:
    """[tokens, V] of one prompt."""
    backend.kv.open(0, token_ids, "", reuse="nothing")
    assert backend.kv.reserve(0, len(token_ids))
    found = backend.forward([Chunk(0, token_ids, 0, "all")]).clone()
    backend.kv.close(0, keep=False)
    return found


def test_sums_in_float16_hardly_move_the_next_token_of_a_real_model(monkeypatch: pytest.MonkeyPatch):
    """By the divergence of its distribution: about as little as an 8-bit cache, which moves it by 0.0002 nats."""
    settings = ModelSettings(max_model_len=256, max_num_seqs=1, cache=CacheSettings(tokens=256, dtype="f16"))
    with closing(HFBackend(smollm2_bf16(), settings, lambda _: None)) as backend:
        token_ids = backend.tokenizer.encode(TEXT, parse_special=False, is_start=True)[:NUM_TOKENS]
        exact = logits(backend, token_ids).log_softmax(1)
        halved = SimpleNamespace(**{name: getattr(reference, name) for name in OPERATIONS} | {"linear": half_sums})
        monkeypatch.setattr(dispatch, "_kernels_for", lambda x: halved)

        found = logits(backend, token_ids).log_softmax(1)

    divergence = (exact.exp() * (exact - found)).sum(1)
    assert 1e-8 < divergence.mean() < 4e-4
    assert (found.argmax(1) == exact.argmax(1)).float().mean() > 0.95


def test_a_sum_in_float16_of_real_weights_is_within_its_bound():
    shard = load_file(sorted(smollm2_bf16().glob("*.safetensors"))[0])
    weight = next(tensor for name, tensor in sorted(shard.items()) if name.endswith("down_proj.weight")).float()
    x = torch.randn(16, weight.shape[1])

    off = (half_sums(x, weight).double() - x.half().double() @ weight.half().double().t()).abs()

    assert (off <= largest_error(x, weight)).all()
    assert off.max() > 1e-4  # What float32 sums are off by is far below.
