"""Steps of a whole model over caches of noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.gpu.cases import make_step, make_table, noisy_cache
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.run.graphs import DecodeGraphs, recordings
from tightrope.kernels.forms.layout import CacheFormat, LayerCache


def noisy_caches(model: LoadedModel, num_tokens: int) -> list[LayerCache]:
    """8-bit caches of all layers, for sequences of so many tokens in all, a multiple of a page each."""
    layer = model.layers[0]
    _, num_pages = make_step(((1, num_tokens),), model.device)
    format = CacheFormat("q8", layer.num_kv_heads, layer.head_dim)
    return [noisy_cache(format, num_pages, model.device) for _ in model.layers]


def cache_bytes(model: LoadedModel, num_tokens: int) -> int:
    """Of keys and values of so many tokens in all layers of such caches."""
    layer = model.layers[0]
    return CacheFormat("q8", layer.num_kv_heads, layer.head_dim).bytes_per_token * num_tokens * len(model.layers)


def record_all(model: LoadedModel, caches: Sequence[LayerCache], max_num_seqs: int, context: int) -> DecodeGraphs:
    """All recordings that a server makes of its decode steps; on a CPU each is the step itself.

    Their sequences have a token each, all in the same place of the cache.
    """
    device = model.device
    capture = None if device.type == "cuda" else lambda step: step
    graphs = DecodeGraphs(partial(model.forward, caches), max_num_seqs, context, device, capture)
    table = make_table(model.layers[0].head_dim, context, max_num_seqs, device, theta=5e6)
    for num_seqs, longest in recordings(max_num_seqs, context):
        step, _ = make_step(((1, 1),) * num_seqs, device)
        tables = {"default": replace(table, set_of=table.set_of[:num_seqs])}
        token_ids, rows = torch.zeros(num_seqs, dtype=torch.int64, device=device), torch.arange(num_seqs, device=device)
        step = replace(step, block_tables=step.block_tables * 0, slots=step.slots * 0, max_context_len=longest)
        graphs.forward(token_ids, step, tables, rows, embedded=model.embedded(token_ids))
    return graphs


def model_step(
    model: LoadedModel, caches: Sequence[LayerCache], lengths: tuple[tuple[int, int], ...], *, is_recorded: bool = False
) -> Callable[[], Tensor]:
    """A step of sequences with (tokens in the step, tokens cached with them) each; it gives logits of their last ones.

    is_recorded: as a CUDA graph, if there is a card.
    """
    torch.manual_seed(0)
    device = model.device
    step, _ = make_step(lengths, device)
    context = max(length for _, length in lengths)
    tables = {"default": make_table(model.layers[0].head_dim, context, len(lengths), device, theta=5e6)}
    token_ids = torch.arange(sum(new for new, _ in lengths), device=device)
    over = partial(model.forward, caches)
    is_graph = is_recorded and device.type == "cuda"
    forward = DecodeGraphs(over, len(lengths), context, device).forward if is_graph else over
    rows = step.query_starts[1:].long() - 1
    return partial(forward, token_ids, step, tables, rows, embedded=model.embedded(token_ids))
