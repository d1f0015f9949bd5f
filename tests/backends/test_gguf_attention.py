"""Whose attention llama.cpp's steps use, and that both are the same one."""

from contextlib import closing

import pytest
import torch
from torch import Tensor

from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, KVCacheDtype, ModelSettings
from tightrope.kernels import dispatch
from tightrope.kernels.cpu import native

# KL of our logits to ggml's: it rounds queries to the type of the keys, and the tokens are noise.
MOST_APART: dict[KVCacheDtype, float] = {"f16": 0.02, "q8": 0.05, "q4": 0.3}
PROMPT = [token * 37 % 40_000 + 100 for token in range(700)]


def logits_of(cache: KVCacheDtype, steps: list[int]) -> tuple[Tensor, bool]:
    """[1, V] of a prompt's last token, and whether our kernel has computed them."""
    settings = ModelSettings(threads=2, max_model_len=1024, cache=CacheSettings(tokens=1024, dtype=cache))
    with closing(GGUFBackend(bundled_model(), settings, lambda share: None)) as backend:
        backend.kv.open(0, PROMPT, "")
        start = 0
        for length in steps:
            some = PROMPT[start : start + length]
            assert backend.kv.reserve(0, length)
            logits = backend.forward([Chunk(0, some, start, "last")])
            backend.kv.commit(0, start, some)
            start += length
        return logits.clone(), backend._context.has_own_attention


@pytest.mark.parametrize("cache", MOST_APART)
@pytest.mark.parametrize("steps", [[400, 300], [400, 280, 20], [400, 299, 1]])
def test_both_give_the_same_logits(monkeypatch: pytest.MonkeyPatch, cache: KVCacheDtype, steps: list[int]) -> None:
    ours, is_own = logits_of(cache, steps)
    assert is_own == bool(set(native.usable()) - {"portable"})
    monkeypatch.setattr(dispatch, "cell_attention", lambda: None)
    theirs, is_own = logits_of(cache, steps)
    assert not is_own
    shares = torch.log_softmax(torch.stack([ours, theirs]), -1)
    apart = (shares[0].exp() * (shares[0] - shares[1])).sum(-1)
    assert apart.max() < MOST_APART[cache]


def test_a_ggml_of_another_layout_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.CellAttention, "recognize", lambda self, samples, has_windows: False)
    _, is_own = logits_of("f16", [400, 300])
    assert not is_own
