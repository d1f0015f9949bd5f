"""How near products with quantized matrices come to this machine's limits, with torch's own in the same run.

    python -m bench.quantized [--threads N]

The limit is the bandwidth with which all threads together read memory; what is read is a matrix as it is stored, scales
included. Matrices are taken in turn from a set larger than the processor's caches, as a model's layers are. Writes
bench/results/quantized.json.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from bench.kernels import BEYOND_CACHES, Row, seconds, share_of_stream, shown
from tightrope.backends.threads import compute_threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, arrange, pack, pack_nf4, tiled

LARGE = (4096, 11008)  # outputs, inputs
SMALL = ((576, 576), (192, 576), (1536, 576), (576, 1536))  # of SmolLM2-135M
GROUP_ROWS = 128
Matrix = QuantizedMatrix | Nf4Matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="0 is one per physical core")
    threads = compute_threads(parser.parse_args().threads)
    torch.set_num_threads(threads)
    dispatch.set_threads(threads)
    widths = [
        measured(f"{bits} bits", quantized(*LARGE, [bits]), rows)
        for bits in (2, 3, 4, 5, 6, 8)
        for rows in (1, 4, 8, 64, 512)
        if rows == 1 or bits == 4
    ]
    kinds = {
        "4 bits, act-order": quantized(*LARGE, [4], is_ordered=True),
        "4 bits, zero points": quantized(*LARGE, [4], has_zeros=True),
        "4 bits, groups of 32": quantized(*LARGE, [4], group_rows=32),
        "exl2: 5 and 4 bits, groups of 32, act-order": quantized(
            *LARGE, [5, 4, 4], group_rows=32, is_ordered=True, has_codes=True
        ),
    }
    results: dict[str, object] = {
        "kernels": dispatch.describe(),
        "threads": threads,
        "matrices": widths
        + [measured(name, matrix, 1) for name, matrix in kinds.items()]
        + [measured("nf4", nf4(*LARGE), rows) for rows in (1, 4, 8, 64, 512)]
        + [measured("4 bits", quantized(n, k, [4], group_rows=64), 1) for n, k in SMALL],
        "peers": [torch_float32(rows) for rows in (1, 8, 64, 512)] + [torch_int4(rows) for rows in (1, 8)],
    }
    print(report.write("quantized", results))


def quantized(
    outputs: int,
    inputs: int,
    widths: Sequence[int],
    *,
    group_rows: int = GROUP_ROWS,
    is_ordered: bool = False,
    has_zeros: bool = False,
    has_codes: bool = False,
) -> QuantizedMatrix:
    """A matrix of noise, with an even share of rows for each width."""
    groups = inputs // group_rows
    bits = [widths[g * len(widths) // groups] for g in range(groups)]
    rows = arrange(torch.randperm(inputs) if is_ordered else torch.arange(inputs), [group_rows] * groups, bits)
    most = (1 << rows.group_bits.int()).repeat_interleave(rows.group_starts.diff()).unsqueeze(1)
    codes = (torch.rand(len(most), outputs) * most).to(torch.uint8)
    scale_codes = torch.randint(1, 17, (groups, outputs), dtype=torch.uint8)
    return QuantizedMatrix(
        inputs,
        outputs,
        rows.source,
        rows.group_starts,
        rows.group_bits,
        pack(codes, rows),
        scales=None if has_codes else tiled(torch.rand(groups, outputs).half()),
        scale_codes=tiled(scale_codes) if has_codes else None,
        group_max=torch.rand(groups) if has_codes else None,
        zeros=tiled(torch.randint(0, 16, (groups, outputs), dtype=torch.int16)) if has_zeros else None,
    )


def nf4(outputs: int, inputs: int, blocksize: int = 64) -> Nf4Matrix:
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8)
    return pack_nf4(codes, torch.rand(outputs, inputs // blocksize), torch.linspace(-1, 1, 16), blocksize)


def measured(name: str, matrix: Matrix, rows: int) -> Row:
    """`rows` rows of x times copies of a matrix that together are larger than the caches."""
    copies = [replace(matrix, codes=matrix.codes.clone()) for _ in range(max(1, int(BEYOND_CACHES / matrix.num_bytes)))]
    x = torch.randn(rows, matrix.num_inputs)
    num_bytes = matrix.num_bytes * len(copies)
    took, limit = share_of_stream(lambda: [product(x, copy) for copy in copies], num_bytes)
    spent = took / len(copies)
    return shown(
        "matrix",
        {
            "kind": name,
            "outputs": matrix.num_outputs,
            "inputs": matrix.num_inputs,
            "rows": rows,
            "bits_per_weight": round(8 * matrix.num_bytes / matrix.num_inputs / matrix.num_outputs, 2),
            "us": round(spent * 1e6, 1),
            **limit,
            "gflop_per_s": round(2 * rows * matrix.num_inputs * matrix.num_outputs / spent / 1e9, 1),
        },
    )


def product(x: Tensor, matrix: Matrix) -> Tensor:
    if isinstance(matrix, Nf4Matrix):
        return dispatch.nf4_linear(x, [matrix], None)
    return dispatch.quantized_linear(x, [matrix], None)


def torch_float32(rows: int) -> Row:
    """torch's linear with expanded weights."""
    outputs, inputs = LARGE
    x, weights = torch.randn(rows, inputs), [torch.randn(outputs, inputs) for _ in range(2)]
    return peer("torch linear, float32", rows, lambda: [F.linear(x, weight) for weight in weights], 2)


def torch_int4(rows: int) -> Row:
    """torch's own 4-bit product, groups of 128, in bfloat16."""
    outputs, inputs = LARGE
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(inputs // GROUP_ROWS, outputs, 2).bfloat16()
    x = torch.randn(rows, inputs).bfloat16()

    def work() -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_ROWS, scales)
        return out

    return peer("torch int4, bfloat16", rows, work, 1)


def peer(name: str, rows: int, work: Callable[[], object], count: int) -> Row:
    return shown("peer", {"kind": name, "rows": rows, "us": round(seconds(work, 2) / count * 1e6, 1)})


if __name__ == "__main__":
    main()
