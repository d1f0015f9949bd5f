"""Random layers to run kernels on: cached tokens, the sequences of a step, rotary angles."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
class Shape:
    """One layer and the sequences of one step: (tokens in the step, tokens cached with them) of each."""

    lengths: tuple[tuple[int, int], ...]
    num_kv_heads: int
    group: int  # query heads that share a key head
    head_dim: int
    dtype: CacheDtype
    rotated: int  # dimensions; 0: keys are not rotated when they are read
    spec: AttentionSpec

    def __str__(self) -> str:
        steps = " ".join(f"{new}/{length}" for new, length in self.lengths)
        options = (("window", self.spec.window), ("softcap", self.spec.softcap))
        extras = "".join(f" {name}={value}" for name, value in options if value)
        heads = f"{self.num_kv_heads}x{self.group} heads of {self.head_dim}"
        return f"{self.dtype}, {heads}, {self.rotated} rotated, tokens {steps}{extras}"


@dataclass(frozen=True)
class Case:
    """What the kernels are given for a shape. `cache` holds noise at every token of every sequence."""

    queries: Tensor  # [T, H, D]
    keys: Tensor  # [T, Hkv, D]
    values: Tensor  # [T, Hkv, D]
    cache: LayerCache
    step: StepLayout
    table: RopeTable | None


def make_case(shape: Shape, device: torch.device, activations: torch.dtype) -> Case:
    """Random numbers of a fixed seed."""
    torch.manual_seed(0)
    num_tokens = sum(new for new, _ in shape.lengths)
    num_heads = shape.num_kv_heads * shape.group

    def randn(heads: int) -> Tensor:
        return torch.randn(num_tokens, heads, shape.head_dim, device=device).to(activations)

    step, num_pages = make_step(shape.lengths, device)
    cache = noisy_cache(CacheFormat(shape.dtype, shape.num_kv_heads, shape.head_dim), num_pages, device)
    table = make_table(shape.rotated, step.max_context_len, len(shape.lengths), device) if shape.rotated else None
    return Case(randn(num_heads), randn(shape.num_kv_heads), randn(shape.num_kv_heads), cache, step, table)


def make_step(lengths: tuple[tuple[int, int], ...], device: torch.device) -> tuple[StepLayout, int]:
    """The layout of sequences whose pages lie in random order, and the number of pages."""
    pages_of = [-(-length // PAGE) for _, length in lengths]
    shuffled = torch.randperm(sum(pages_of)).int()
    block_tables = torch.zeros(len(lengths), max(pages_of), dtype=torch.int32)
    for row, own in zip(block_tables, shuffled.split(pages_of), strict=True):
        row[: len(own)] = own
    counts = torch.tensor([new for new, _ in lengths])
    sequence_of = torch.arange(len(lengths)).repeat_interleave(counts)
    positions = torch.cat([torch.arange(length - new, length) for new, length in lengths])
    slots = block_tables[sequence_of, positions // PAGE].long() * PAGE + positions % PAGE
    step = StepLayout(
        query_starts=torch.cat((torch.zeros(1), counts.cumsum(0))).int().to(device),
        context_lens=torch.tensor([length for _, length in lengths], dtype=torch.int32, device=device),
        block_tables=block_tables.to(device),
        slots=slots.to(device),
        positions=positions.int().to(device),
        sequence_of=sequence_of.int().to(device),
        max_query_len=max(new for new, _ in lengths),
        max_context_len=max(length for _, length in lengths),
        lengths=lengths,
    )
    return step, sum(pages_of)


def noisy_cache(format: CacheFormat, num_pages: int, device: torch.device) -> LayerCache:
    """Pages full of random codes, with scales that give keys and values of about 1."""
    cache = LayerCache.allocate(format, num_pages, device)
    for codes in (cache.key_codes, cache.value_codes):
        if format.dtype == "f16":
            codes.normal_()
        else:
            low, high = (-127, 128) if format.dtype == "q8" else (0, 256)
            codes.copy_(torch.randint(low, high, codes.shape, dtype=codes.dtype, device=device))
    if format.dtype != "f16":
        for scales in (cache.key_scales, cache.value_scales):
            scales.uniform_(0.5, 1.5).mul_(1 / 64 if format.dtype == "q8" else 1 / 4)
        cache.key_factor.uniform_(0.5, 2.0)
    return cache


def make_table(rotated: int, num_tokens: int, num_seqs: int, device: torch.device, theta: float = 1e4) -> RopeTable:
    """Plain rotary angles of `rotated` dimensions for positions below `num_tokens`."""
    inv_freq = theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)

    def angles(positions: Tensor) -> Tensor:
        angle = positions.double().outer(inv_freq)
        return torch.stack((angle.cos(), angle.sin()), 1).float().unsqueeze(0).to(device)

    return RopeTable(
        pages=angles(torch.arange(-(-num_tokens // PAGE)) * PAGE),
        places=angles(torch.arange(PAGE)),
        set_of=torch.zeros(num_seqs, dtype=torch.int32, device=device),
        query_scale=torch.ones(1, device=device),
    )
