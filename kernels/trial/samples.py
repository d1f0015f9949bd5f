"""Small random numbers in the forms that kernels read, from a fixed seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, arrange, pack, pack_nf4, tiled

Packed = QuantizedMatrix | Nf4Matrix


@dataclass(frozen=True, slots=True)
class Samples:
    """For kernels of `device`, whose activations are of `dtype`. What has no device named is on the CPU."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        """Activations, on the device."""
        return self.plain(*shape).to(self.device, self.dtype)

    def plain(self, *shape: int) -> Tensor:
        """float32."""
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """float32 of 0 to 1."""
        return torch.rand(*shape, generator=self.generator)

    def codes(self, most: Tensor | int, *shape: int) -> Tensor:
        """uint8 below `most`."""
        return (self.uniform(*shape) * most).to(torch.uint8)

    def gptq(self, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
        """Four bits in groups of 32, with zero points and in any order of rows, as AWQ has them, too."""
        groups = num_inputs // 32
        rows = arrange(torch.randperm(num_inputs, generator=self.generator), [32] * groups, [4] * groups)
        return QuantizedMatrix(
            num_inputs,
            num_outputs,
            rows.source,
            rows.group_starts,
            rows.group_bits,
            pack(self.codes(16, num_inputs, num_outputs), rows),
            scales=tiled((self.uniform(groups, num_outputs) / 32).half()),
            zeros=tiled(self.codes(16, groups, num_outputs).to(torch.int16)),
        )

    def exl2(self, num_outputs: int) -> QuantizedMatrix:
        """Six groups of 32 inputs, one of each width."""
        bits = [8, 6, 5, 4, 3, 2]
        rows = arrange(torch.randperm(192, generator=self.generator), [32] * 6, bits)
        most = torch.tensor([1 << width for width in bits]).unsqueeze(1)  # [G, 1]
        return QuantizedMatrix(
            192,
            num_outputs,
            rows.source,
            rows.group_starts,
            rows.group_bits,
            pack(self.codes(most.repeat_interleave(32, 0), 192, num_outputs), rows),
            scale_codes=tiled(1 + self.codes(16, 6, num_outputs)),
            group_max=1 / most.squeeze(1),
        )

    def nf4(self, num_inputs: int, num_outputs: int) -> Nf4Matrix:
        """Codes of a book of cubes, in blocks of 64."""
        scales = self.uniform(num_outputs, num_inputs // 64)
        return pack_nf4(self.codes(16, num_outputs, num_inputs), scales, torch.linspace(-1, 1, 16).pow(3), 64)

    def cache(self, format: CacheFormat, num_pages: int) -> tuple[LayerCache, LayerCache]:
        """The same empty pages on the device and on the CPU."""
        mine, plain = (LayerCache.allocate(format, num_pages, device) for device in (self.device, "cpu"))
        if format.dtype != "f16":
            factor = self.uniform(format.num_kv_heads, format.head_dim) + 0.5
            mine.key_factor.copy_(factor)
            plain.key_factor.copy_(factor)
        return mine, plain


def step_of(lengths: Sequence[tuple[int, int]]) -> StepLayout:
    """Sequences with (tokens of the step, tokens cached with them) each, whose pages lie one behind the other."""
    width = max(-(-length // PAGE) for _, length in lengths)
    counts = torch.tensor([new for new, _ in lengths])
    tables = torch.arange(len(lengths) * width, dtype=torch.int32).view(-1, width)
    sequence_of = torch.arange(len(lengths)).repeat_interleave(counts)
    positions = torch.cat([torch.arange(length - new, length) for new, length in lengths])
    return StepLayout(
        query_starts=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
        context_lens=torch.tensor([length for _, length in lengths], dtype=torch.int32),
        block_tables=tables,
        slots=tables[sequence_of, positions // PAGE].long() * PAGE + positions % PAGE,
        positions=positions.int(),
        sequence_of=sequence_of.int(),
        max_query_len=int(counts.max()),
        max_context_len=max(length for _, length in lengths),
        lengths=tuple(lengths),
    )


def angles(num_pages: int, half: int, num_seqs: int, device: torch.device | str = "cpu") -> RopeTable:
    """One set of frequencies for all of `num_seqs` sequences: pairs `half`, positions up to the end of the pages."""
    frequencies = 10000.0 ** (-torch.arange(half) / half)

    def of(positions: Tensor) -> Tensor:
        angle = positions.unsqueeze(1) * frequencies
        return torch.stack((angle.cos(), angle.sin()), 1).unsqueeze(0).to(device)  # [1, n, 2, half]

    return RopeTable(
        pages=of(torch.arange(num_pages) * PAGE),
        places=of(torch.arange(PAGE)),
        set_of=torch.zeros(num_seqs, dtype=torch.int32, device=device),
        query_scale=torch.ones(1, device=device),
    )
