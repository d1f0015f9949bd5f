"""Models of ours beside the untouched classes of transformers: the logits of both for the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from step_builder import rope_tables, step_of
from torch import Tensor
from transformers import PreTrainedModel

from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

PAGES_EACH = 4  # 64 tokens a sequence


@dataclass(frozen=True)
class Pair:
    """The untouched class, and ours from its files."""

    untouched: PreTrainedModel
    ours: LoadedModel
    rope: Mapping[str, RopeSpec]


def caches_of(model: LoadedModel, num_sequences: int, dtype: torch.dtype) -> list[LayerCache]:
    """A cache of 16-bit format for each layer, its values held in `dtype`."""
    caches = []
    for layer in model.layers:
        cache = LayerCache.allocate(CacheFormat("f16", layer.num_kv_heads, layer.head_dim), num_sequences * PAGES_EACH)
        caches.append(replace(cache, key_codes=cache.key_codes.to(dtype), value_codes=cache.value_codes.to(dtype)))
    return caches


def run(
    pair: Pair, caches: Sequence[LayerCache], prompts: Sequence[Tensor], steps: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits of every token of every prompt; each step runs so many further tokens of each prompt."""
    done, outputs = [0] * len(prompts), [[] for _ in prompts]
    for counts in steps:
        layout = step_of(list(zip(done, counts, strict=True)), PAGES_EACH)
        ids = torch.cat([p[d : d + n] for p, d, n in zip(prompts, done, counts, strict=True)])
        done = [d + n for d, n in zip(done, counts, strict=True)]
        tables = rope_tables(pair.rope, done, PAGES_EACH)
        logits = pair.ours.forward(caches, ids, layout, tables, torch.arange(len(ids)))
        for output, part in zip(outputs, logits.split(list(counts)), strict=True):
            output.append(part)
    return [torch.cat(output) for output in outputs]


def wanted(pair: Pair, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.untouched(prompt.unsqueeze(0)).logits[0]


def deviation(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the largest logit."""
    return ((got - want).abs().max() / want.abs().max()).item()
