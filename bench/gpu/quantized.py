"""Quantized matrices: every Triton kernel against float64, and products against the bandwidth of a card's memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu.correctness import BOUNDS, Check
from bench.gpu.matrices import EXL2_MIX, GROUP_ROWS, exl2_bits, large_matrix, random_matrix, random_nf4
from bench.gpu.timing import recorded, seconds
from tightrope.kernels import dispatch
from tightrope.kernels.exllama import ExllamaMatrix
from tightrope.kernels.forms.columns import ColumnMatrix, to_columns
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, dequantize

BAR = 0.6  # share of the bandwidth that one row must reach
INPUTS, OUTPUTS = 7168, 20480  # of Yi-34B's MLP
ROWS = (1, 8)
WORKING_SET = 1 << 30  # bytes, beyond the last cache: matrices are taken in turn, as a model's layers are
EXLLAMA_BOUND = 3e-2  # it rounds scales to float16 and sums in it

Times = Callable[[Tensor], Tensor]


def check_products(device: torch.device, is_smoke: bool, show: Callable[[str], None]) -> list[Check]:
    """One row a check, as of correctness.check_kernels: matrices of every kind times few and many rows."""
    rows = []
    for name, matrix in _few() if is_smoke else _kinds():
        weight = dequantize(matrix).to(device).double()  # [K, N]
        kernels = [("quantized", _column_product(to_columns(matrix, device)), BOUNDS)]
        if device.type == "cuda" and isinstance(matrix, QuantizedMatrix) and dispatch.is_exllama(matrix):
            taken = dispatch.to_exllama(matrix, device)
            kernels.append(("exllamav2", _exllama_product(taken), {torch.float16: EXLLAMA_BOUND}))
        for num_rows in (1, 3, 65) if is_smoke else (1, 2, 8, 16, 17, 33, 64, 65, 300):
            for kernel, times, bounds in kernels:
                for dtype in (torch.float32,) if is_smoke else bounds:
                    rows.append(_check(f"{kernel} {name}", times, weight, num_rows, dtype, bounds[dtype]))
        show(f"quantized {name}: {len(rows)} products")
    return rows


def _check(kernel: str, times: Times, weight: Tensor, num_rows: int, dtype: torch.dtype, bound: float) -> Check:
    x = torch.randn(num_rows, len(weight), generator=torch.Generator().manual_seed(num_rows))
    x = x.to(weight.device, dtype)
    wanted = x.double() @ weight
    error = ((times(x).double() - wanted).abs().max() / wanted.abs().max()).item()
    case = f"{str(dtype).removeprefix('torch.')} {num_rows} x {len(weight)} x {weight.shape[1]}"
    return {"kernel": kernel, "case": case, "error": error, "bound": bound, "holds": error <= bound}


def _kinds() -> Iterator[tuple[str, QuantizedMatrix | Nf4Matrix]]:
    """EXL2 of each width and of all, GPTQ and AWQ with zero points and in any groups, codes of a book."""
    for bits in (2, 3, 4, 5, 6, 8):
        yield f"exl2 {bits} bits", random_matrix([128] * 8, [bits] * 8, 768, is_coded=True, is_permuted=True)
    yield "exl2 mixed", random_matrix([32] * 24, [8, 6, 5, 4, 3, 2] * 4, 800, is_coded=True, is_permuted=True)
    widths = [bits for bits in (8, 6, 5, 4, 3, 2) for _ in range(4)]  # the widest first, as converters write them
    yield "exl2 sorted", random_matrix([32] * 24, widths, 800, is_coded=True, is_permuted=True)
    for bits in (2, 3, 4, 8):
        yield f"gptq {bits} bits", random_matrix([128] * 6, [bits] * 6, 520, has_zeros=True)
    yield "gptq act-order", random_matrix([32] * 32, [4] * 32, 512, has_zeros=True, is_permuted=True)
    yield "gptq one group", random_matrix([1000], [4], 100)
    yield "gptq uneven groups", random_matrix([40] * 20, [4] * 20, 264, has_zeros=True)
    yield "nf4", random_nf4(1024, 640, 64)


def _few() -> Iterator[tuple[str, QuantizedMatrix | Nf4Matrix]]:
    yield "exl2 mixed", random_matrix([32, 32], [5, 4], 48, is_coded=True, is_permuted=True)
    yield "gptq 4 bits", random_matrix([64], [4], 40, has_zeros=True)
    yield "nf4", random_nf4(64, 32, 64)


def measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each kind of matrix, number of rows and kernel: time of a product, share of `bandwidth`."""
    inputs, outputs = (GROUP_ROWS, 32) if is_smoke else (INPUTS, OUTPUTS)
    rows: list[dict[str, object]] = []
    for kind, matrix in _large(inputs, outputs, device):
        runners = _runners(matrix, device, 1 if is_smoke else WORKING_SET)
        for num_rows in ROWS:
            x = torch.randn(num_rows, inputs, device=device).half()
            for kernel, num_bytes, products in runners:
                row = _measure(x, kind, kernel, num_bytes, products, bandwidth)
                rows.append(row)
                show(
                    f"product: {num_rows} x {inputs} x {outputs}, {kind}, {kernel}: {row['product_us']:.0f} us, "
                    f"{row['share']:.0%} of the bandwidth"
                )
    return rows


def _large(inputs: int, outputs: int, device: torch.device) -> Iterator[tuple[str, QuantizedMatrix | Nf4Matrix]]:
    four = [4] * (inputs // GROUP_ROWS)
    mean = sum(bits * share for bits, share in EXL2_MIX)
    yield "gptq 4 bits", large_matrix(inputs, outputs, four, device, is_exl2=False, is_permuted=False)
    yield "gptq 4 bits act-order", large_matrix(inputs, outputs, four, device, is_exl2=False, is_permuted=True)
    yield "exl2 4 bits", large_matrix(inputs, outputs, four, device, is_exl2=True, is_permuted=True)
    yield (
        f"exl2 {mean:.2f} bits",
        large_matrix(inputs, outputs, exl2_bits(inputs), device, is_exl2=True, is_permuted=True),
    )
    yield "nf4", random_nf4(inputs, outputs, 64)


def _runners(
    matrix: QuantizedMatrix | Nf4Matrix, device: torch.device, working_set: int
) -> list[tuple[str, int, list[Times]]]:
    """Kernel, bytes of a matrix, and products with as many copies of it as fill the working set."""
    columns = to_columns(matrix, device)
    count = -(-working_set // columns.num_bytes)
    copies = [columns, *(_copy(columns) for _ in range(count - 1))]
    runners = [("Triton", columns.num_bytes, [_column_product(copy) for copy in copies])]
    if device.type == "cuda" and isinstance(matrix, QuantizedMatrix) and dispatch.is_exllama(matrix):
        taken = [dispatch.to_exllama(matrix, device) for _ in range(count)]
        num_bytes = sum(tensor.nbytes for tensor in taken[0].tensors if not tensor.is_meta)
        runners.append(("exllamav2", num_bytes, [_exllama_product(one) for one in taken]))
    return runners


def _copy(matrix: ColumnMatrix) -> ColumnMatrix:
    values = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
    copies: dict[str, Any] = {name: v.clone() for name, v in values.items() if isinstance(v, Tensor)}
    return replace(matrix, **copies)


def _column_product(matrix: ColumnMatrix) -> Times:
    return lambda x: dispatch.column_linear(x, [matrix], None)


def _exllama_product(matrix: ExllamaMatrix) -> Times:
    return lambda x: dispatch.exllama_linear(x, [matrix], None)


def _measure(
    x: Tensor, kind: str, kernel: str, num_bytes: int, products: Sequence[Times], bandwidth: float
) -> dict[str, object]:
    def work() -> None:
        for times in products:
            times(x)

    is_card = x.device.type == "cuda"
    work()  # compiles what a recording can't
    time = seconds(recorded(work) if is_card else work, x.device, 20 if is_card else 1) / len(products)
    share = num_bytes / time / bandwidth
    bar = BAR if len(x) == 1 and kernel == "Triton" else None
    return {
        "matrix": kind,
        "inputs": x.shape[1],
        "rows": len(x),
        "kernel": kernel,
        "matrix_bytes": num_bytes,
        "product_us": time * 1e6,
        "share": share,
        "bar": bar,
        "holds": bar is None or share >= bar,
    }
