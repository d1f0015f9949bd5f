"""Random layers and steps for attention kernels: several sequences, their history in shuffled pages."""

from dataclasses import dataclass, replace

import torch
from error_bounds import Store
from torch import Tensor

from bench.gpu.cases import make_step
from tightrope.kernels import reference
from tightrope.kernels.forms.layout import (
    PAGE,
    AttentionSpec,
    CacheDtype,
    CacheFormat,
    LayerCache,
    RopeTable,
    StepLayout,
)


@dataclass(frozen=True)
class Case:
    """One step over one layer: everything that the kernels are given."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    cache: LayerCache
    step: StepLayout
    table: RopeTable | None
    spec: AttentionSpec


def make_case(
    lengths: list[tuple[int, int]],
    head_dim: int = 64,
    num_kv_heads: int = 2,
    group: int = 3,
    dtype: CacheDtype = "q8",
    rotated: int | None = None,
    num_sets: int = 1,
    spec: AttentionSpec | None = None,
    activations: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Sequences of (tokens in this step, tokens in all), their history stored in shuffled pages."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rotated = head_dim if rotated is None else rotated
    torch.manual_seed(seed)  # The step's pages are shuffled by torch's own generator.
    step, num_pages = make_step(tuple(lengths), torch.device("cpu"))
    step = replace(step, lengths=())  # Prompts of known lengths are expanded.
    cache = LayerCache.allocate(CacheFormat(dtype, num_kv_heads, head_dim), num_pages + 3)
    if dtype != "f16":
        cache.key_factor.copy_(randn(num_kv_heads, head_dim).abs() + 0.5)
    history = torch.cat([slots_of(step, b, length) for b, (_, length) in enumerate(lengths)])
    shape = (len(history), num_kv_heads, head_dim)
    reference.store_kv(cache, randn(*shape), randn(*shape), history)
    table = make_table(rotated, step.block_tables.shape[1], num_sets, len(lengths)) if rotated else None
    num_tokens = len(step.slots)
    return Case(
        randn(num_tokens, num_kv_heads, head_dim).to(activations),
        randn(num_tokens, num_kv_heads, head_dim).to(activations),
        randn(num_tokens, num_kv_heads * group, head_dim).to(activations),
        cache,
        step,
        table,
        spec or AttentionSpec(scale=head_dim**-0.5),
    )


def slots_of(step: StepLayout, sequence: int, length: int) -> Tensor:
    """[length] int64: where a sequence's tokens lie."""
    place = torch.arange(length)
    return step.block_tables[sequence, place // PAGE].long() * PAGE + place % PAGE


def make_table(rotated: int, num_pages: int, num_sets: int, num_seqs: int) -> RopeTable:
    frequencies = torch.stack([(500.0 + 100 * s) ** (-torch.arange(0, rotated, 2) / rotated) for s in range(num_sets)])

    def angles(positions: Tensor) -> Tensor:
        angle = positions.view(1, -1, 1) * frequencies.view(num_sets, 1, -1)
        return torch.stack((angle.cos(), angle.sin()), 2)

    return RopeTable(
        pages=angles(torch.arange(num_pages) * PAGE),
        places=angles(torch.arange(PAGE)),
        set_of=torch.arange(num_seqs, dtype=torch.int32) % num_sets,
        query_scale=1 + torch.arange(num_sets) / 4,
    )


def check_negative_slots_store_nothing(store: Store) -> None:
    """Fail unless a token without a slot leaves all pages as they were, while those beside it are stored."""
    dtypes: tuple[CacheDtype, ...] = ("q8", "q4", "f16")
    for dtype in dtypes:
        case = make_case([(3, 20)], dtype=dtype)
        names = ("key_codes", "key_scales", "value_codes", "value_scales")
        before = {name: getattr(case.cache, name).clone() for name in names}
        slots = case.step.slots.clone()
        slots[1] = -1

        store(case.cache, case.keys, case.values, slots)

        for name in names:
            is_changed = (getattr(case.cache, name) != before[name]).any(-1).any(1)  # [pages, PAGE]
            changed = set(is_changed.flatten().nonzero().flatten().tolist())
            wanted = {int(slots[0]), int(slots[2])}
            assert changed == wanted if name.endswith("codes") else changed <= wanted, (dtype, name)
