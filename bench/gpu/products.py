"""Products of quantized matrices and few rows against the bandwidth of the device's memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.matrices import EXL2_MIX, GROUP_ROWS, exl2_bits, large_matrix, random_nf4
from bench.gpu.run import Row, Run, tried
from bench.gpu.timing import recorded, seconds
from tightrope.kernels import dispatch
from tightrope.kernels.exllama import ExllamaMatrix
from tightrope.kernels.forms.columns import ColumnMatrix, to_columns
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix

BAR = 0.6  # share of the bandwidth that one row must reach
INPUTS, OUTPUTS = 7168, 20480  # of Yi-34B's MLP
ROWS = (1, 8)
WORKING_SET = 1 << 30  # bytes, beyond the last cache: matrices are taken in turn, as a model's layers are

Times = Callable[[Tensor], Tensor]


def rows(run: Run) -> Iterator[Row]:
    """One for each kind of matrix, number of rows and kernel."""
    inputs, outputs = (GROUP_ROWS, 32) if run.is_smoke else (INPUTS, OUTPUTS)
    for kind, matrix in _large(inputs, outputs, run.device):
        for kernel, num_bytes, products in _runners(matrix, run):
            for num_rows in ROWS:
                title: Row = {"matrix": kind, "inputs": inputs, "outputs": outputs, "rows": num_rows, "kernel": kernel}
                bar = BAR if num_rows == 1 and kernel == "Triton" else None
                yield tried(title, partial(_measure, run, num_rows, inputs, num_bytes, products, bar))


def _large(inputs: int, outputs: int, device: torch.device) -> Iterator[tuple[str, QuantizedMatrix | Nf4Matrix]]:
    four = [4] * (inputs // GROUP_ROWS)
    mean = sum(bits * share for bits, share in EXL2_MIX)
    yield (
        f"exl2 {mean:.2f} bits",
        large_matrix(inputs, outputs, exl2_bits(inputs), device, is_exl2=True, is_permuted=True),
    )
    yield "gptq 4 bits", large_matrix(inputs, outputs, four, device, is_exl2=False, is_permuted=False)
    yield "gptq 4 bits act-order", large_matrix(inputs, outputs, four, device, is_exl2=False, is_permuted=True)
    yield "nf4", random_nf4(inputs, outputs, 64)


def _runners(matrix: QuantizedMatrix | Nf4Matrix, run: Run) -> list[tuple[str, int, list[Times]]]:
    """Kernel, bytes of a matrix, and products with as many copies of it as fill the working set."""
    columns = to_columns(matrix, run.device)
    count = 1 if run.is_smoke else -(-WORKING_SET // columns.num_bytes)
    copies = [columns, *(_copy(columns) for _ in range(count - 1))]
    runners: list[tuple[str, int, list[Times]]] = [
        ("Triton", columns.num_bytes, [partial(_column_product, copy) for copy in copies])
    ]
    if run.device.type == "cuda" and isinstance(matrix, QuantizedMatrix) and dispatch.is_exllama(matrix):
        taken = [dispatch.to_exllama(matrix, run.device) for _ in range(count)]
        num_bytes = sum(tensor.nbytes for tensor in taken[0].tensors if not tensor.is_meta)
        runners.append(("exllamav2", num_bytes, [partial(_exllama_product, one) for one in taken]))
    return runners


def _copy(matrix: ColumnMatrix) -> ColumnMatrix:
    values = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
    copies: dict[str, Any] = {name: v.clone() for name, v in values.items() if isinstance(v, Tensor)}
    return replace(matrix, **copies)


def _column_product(matrix: ColumnMatrix, x: Tensor) -> Tensor:
    return dispatch.column_linear(x, [matrix], None)


def _exllama_product(matrix: ExllamaMatrix, x: Tensor) -> Tensor:
    return dispatch.exllama_linear(x, [matrix], None)


def _measure(run: Run, num_rows: int, inputs: int, num_bytes: int, products: Sequence[Times], bar: float | None) -> Row:
    x = torch.randn(num_rows, inputs, device=run.device).half()

    def work() -> None:
        for times in products:
            times(x)

    work()  # compiles what a recording can't
    is_card = run.device.type == "cuda"
    time = seconds(recorded(work) if is_card else work, run.device, run.repeats) / len(products)
    return {"matrix_bytes": num_bytes, "product_us": time * 1e6, **run.judged(num_bytes, time, bar)}
