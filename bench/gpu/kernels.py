"""Every Triton kernel against the torch reference or float64, on the device where they run, at two shapes each."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.gpu.cases import Case, Shape, make_case
from bench.gpu.matrices import random_matrix, random_nf4
from bench.gpu.run import Row, Run, compared, compile_ahead, tried
from tightrope.kernels import dispatch, reference
from tightrope.kernels.forms.column_stack import ColumnStack, stack_columns
from tightrope.kernels.forms.columns import to_columns
from tightrope.kernels.forms.layer import StackedExperts
from tightrope.kernels.forms.layout import AttentionSpec
from tightrope.kernels.forms.low_rank import AdapterRows, make_low_rank
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, dequantize
from tightrope.kernels.triton import ops

# Largest error allowed, relative to the largest value: float16 products, and the rounding of the result itself.
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 4e-3, torch.float32: 1e-4}
EXLLAMA_BOUND = 3e-2  # it rounds scales to float16 and sums in it
STEPS = (((1, 5000), (1, 333), (1, 1)), ((200, 700), (1, 900), (33, 33)))  # new and all tokens of each sequence
ROWS = (1, 8, 300)  # of one, of a batch, and of so many that the matrix is expanded
EXPERTS = 8

Check = tuple[Row, Callable[[], Row]]
Times = Callable[[Tensor], Tensor]


def rows(run: Run) -> Iterator[Row]:
    checks = [check for checks in (_layers, _products, _low_rank, _experts) for check in checks(run)]
    ahead = checks[:2] if run.is_smoke else checks  # an interpreter compiles nothing
    yield {"compiled": compile_ahead([check for _, check in ahead])}
    for title, check in checks:
        yield tried(title, check)


def _layers(run: Run) -> Iterator[Check]:
    """Attention and the kernels between the products."""
    for shape in _small() if run.is_smoke else _shapes():
        activations = torch.float32 if run.is_smoke else torch.bfloat16
        case = make_case(shape, run.device, activations)
        for name, work in (("rotate", _rotate), ("attention", _attention), ("rms_norm", _norm), ("gated", _gated)):
            title: Row = {"kernel": name, "case": f"{str(activations).removeprefix('torch.')} {shape}"}
            yield title, partial(work, case, shape, BOUNDS[activations])


def _shapes() -> Iterator[Shape]:
    for dtype in ("q8", "f16"):
        for heads, group, head_dim in ((8, 7, 128), (4, 3, 64)):
            for lengths in STEPS:
                yield Shape(lengths, heads, group, head_dim, dtype, head_dim, AttentionSpec(0.1))
    for spec in (AttentionSpec(0.1, window=512), AttentionSpec(0.1, softcap=5.0)):
        for lengths in STEPS:
            yield Shape(lengths, 2, 4, 128, "q8", 64, spec)


def _small() -> Iterator[Shape]:
    yield Shape(((1, 140), (1, 17)), 2, 3, 64, "q8", 64, AttentionSpec(0.1))
    yield Shape(((5, 20), (1, 40)), 1, 2, 64, "f16", 32, AttentionSpec(0.1, window=16))


def _rotate(case: Case, shape: Shape, bound: float) -> Row:
    assert case.table is not None
    wanted = reference.rotate(case.queries.float(), case.step, case.table)
    return compared(ops.rotate(case.queries, case.step, case.table), wanted, bound)


def _attention(case: Case, shape: Shape, bound: float) -> Row:
    wanted = reference.attention(case.queries.float(), case.cache, case.step, case.table, shape.spec)
    return compared(ops.attention(case.queries, case.cache, case.step, case.table, shape.spec), wanted, bound)


def _norm(case: Case, shape: Shape, bound: float) -> Row:
    weight = torch.rand(shape.head_dim, device=case.queries.device)
    wanted = reference.rms_norm(case.queries.float(), weight, 1e-6)
    return compared(ops.rms_norm(case.queries, weight, 1e-6), wanted, bound)


def _gated(case: Case, shape: Shape, bound: float) -> Row:
    gate_up = case.queries.flatten(1)
    if gate_up.shape[1] % 2:
        gate_up = gate_up[:, 1:]
    return compared(ops.gated(gate_up, "silu"), reference.gated(gate_up.float(), "silu"), bound)


def _products(run: Run) -> Iterator[Check]:
    """Matrices of every kind times one row, a few and many."""
    for kind, matrix in _few() if run.is_smoke else _kinds():
        weight = dequantize(matrix).to(run.device).double()  # [K, N]
        dtype = torch.float32 if run.is_smoke else torch.bfloat16 if kind == "nf4" else torch.float16
        columns = to_columns(matrix, run.device)
        kernels: list[tuple[str, Times, float]] = [
            (kind, lambda x, columns=columns: dispatch.column_linear(x, [columns], None), BOUNDS[dtype])  # type: ignore[misc]
        ]
        if run.device.type == "cuda" and isinstance(matrix, QuantizedMatrix) and dispatch.is_exllama(matrix):
            taken = dispatch.to_exllama(matrix, run.device)
            kernels.append(
                (f"exllamav2 {kind}", lambda x, taken=taken: dispatch.exllama_linear(x, [taken], None), EXLLAMA_BOUND)  # type: ignore[misc]
            )
        for num_rows in ROWS[: 3 - run.is_smoke]:
            for kernel, times, bound in kernels:
                sizes = f"{num_rows} x {matrix.num_inputs} x {matrix.num_outputs}"
                title: Row = {"kernel": kernel, "case": f"{str(dtype).removeprefix('torch.')} {sizes}"}
                yield title, partial(_product, times, weight, num_rows, dtype, bound)


def _product(times: Times, weight: Tensor, num_rows: int, dtype: torch.dtype, bound: float) -> Row:
    x = torch.randn(num_rows, len(weight), generator=torch.Generator().manual_seed(num_rows)).to(weight.device, dtype)
    return compared(times(x), x.double() @ weight, bound)


def _kinds() -> Iterator[tuple[str, QuantizedMatrix | Nf4Matrix]]:
    """At a size of Yi-34B's width, and at one that fills no tile."""
    for inputs, outputs in ((7168, 1024), (1024, 520)):
        groups = inputs // 128
        widths = [6] * (groups // 8) + [5] * (groups // 2)
        widths += [4] * (groups - len(widths))  # the widest first, as converters write them
        four = [4] * groups
        sizes = [128] * groups
        yield "exl2", random_matrix(sizes, widths, outputs, is_coded=True, is_permuted=True)
        yield "gptq", random_matrix(sizes, four, outputs, has_zeros=True, is_permuted=True)
        yield "awq", random_matrix(sizes, four, outputs, has_zeros=True)
        yield "nf4", random_nf4(inputs, outputs, 64)
    yield "exl2 of all widths", random_matrix([32] * 24, [8, 6, 5, 4, 3, 2] * 4, 800, is_coded=True, is_permuted=True)


def _few() -> Iterator[tuple[str, QuantizedMatrix | Nf4Matrix]]:
    yield "exl2", random_matrix([32, 32], [5, 4], 48, is_coded=True, is_permuted=True)
    yield "gptq", random_matrix([64], [4], 40, has_zeros=True, is_permuted=True)
    yield "awq", random_matrix([64], [4], 40, has_zeros=True)
    yield "nf4", random_nf4(64, 32, 64)


def _low_rank(run: Run) -> Iterator[Check]:
    """Rows of two adapters and of none."""
    for rank, inputs, outputs in ((8, 64, 48),) if run.is_smoke else ((16, 7168, 20480), (64, 4096, 1000)):
        for num_rows in (5,) if run.is_smoke else (5, 300):
            title: Row = {"kernel": "low rank", "case": f"{num_rows} x {inputs} x {rank} x {outputs}"}
            yield title, partial(_added, run, rank, inputs, outputs, num_rows)


def _added(run: Run, rank: int, inputs: int, outputs: int, num_rows: int) -> Row:
    dtype = torch.float32 if run.is_smoke else torch.float16
    pieces = [(0, torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank), 0.5)]
    adapters = {slot: make_low_rank(pieces, torch.float16).to(run.device) for slot in (0, 1)}
    slots = (torch.arange(num_rows) % 3 - 1).int().to(run.device)
    of_rows = AdapterRows(slots, torch.rand(num_rows, device=run.device) + 0.5, (0, 1))
    x = torch.randn(num_rows, inputs, device=run.device).to(dtype)
    found, wanted = (torch.zeros(num_rows, outputs, device=run.device, dtype=of) for of in (dtype, torch.float32))
    ops.add_low_rank(found, x, adapters, of_rows)
    reference.add_low_rank(wanted, x.float(), adapters, of_rows)
    return compared(found, wanted, BOUNDS[dtype])


def _experts(run: Run) -> Iterator[Check]:
    """Two of several experts for each token, all at once."""
    for kind in ("plain", "gptq", "exl2"):
        for hidden, middle in ((64, 32),) if run.is_smoke else ((4096, 1024), (512, 192)):
            for num_rows in (3,) if run.is_smoke else (1, 8, 100):
                title: Row = {"kernel": f"experts {kind}", "case": f"{num_rows} x {hidden} x {middle}"}
                yield title, partial(_picked, run, kind, hidden, middle, num_rows)


def _picked(run: Run, kind: str, hidden: int, middle: int, num_rows: int) -> Row:
    dtype = torch.float32 if run.is_smoke else torch.float16
    gate_ups, downs = (
        [_expert(kind, inputs, outputs, e) for e in range(EXPERTS)]
        for inputs, outputs in ((hidden, 2 * middle), (middle, hidden))
    )
    weights = [[dequantize(m) if isinstance(m, QuantizedMatrix) else m for m in side] for side in (gate_ups, downs)]
    layer = StackedExperts(_stacked(run, gate_ups, dtype), _stacked(run, downs, dtype), "silu")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(num_rows, hidden, generator=generator) / 8).to(dtype)  # float16 holds what becomes of it
    picked = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(num_rows)])
    shares = torch.rand(num_rows, 2, generator=generator)
    wanted = torch.zeros(num_rows, hidden)
    for token, experts, weight in zip(range(num_rows), picked.tolist(), shares, strict=True):
        for expert, share in zip(experts, weight, strict=True):
            gates = reference.gated((x[token].float() @ weights[0][expert])[None], "silu")
            wanted[token] += share * (gates @ weights[1][expert])[0]
    given = dispatch.experts(x.to(run.device), layer, picked.to(run.device), shares.to(run.device), None)
    assert given is not None
    return compared(given.cpu(), wanted, 2 * BOUNDS[dtype])  # one rounding more lies between two products


def _expert(kind: str, inputs: int, outputs: int, seed: int) -> QuantizedMatrix | Tensor:
    """Of about the size that keeps a product's; a plain one is [K, N]."""
    if kind == "plain":
        return torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed)) / math.sqrt(inputs)
    groups = inputs // 32
    bits = [5] * (groups // 2) + [4] * (groups - groups // 2) if kind == "exl2" else [4] * groups
    is_exl2 = kind == "exl2"
    return random_matrix(
        [32] * groups, bits, outputs, is_coded=is_exl2, has_zeros=not is_exl2, is_permuted=True, seed=seed
    )


def _stacked(
    run: Run, experts: Sequence[QuantizedMatrix | Tensor], dtype: torch.dtype
) -> Tensor | tuple[ColumnStack, ...]:
    """As a card has them."""
    quantized = [matrix for matrix in experts if isinstance(matrix, QuantizedMatrix)]
    if not quantized:
        return torch.stack([weight.t() for weight in experts if isinstance(weight, Tensor)]).to(run.device, dtype)
    made = stack_columns([to_columns(matrix, run.device) for matrix in quantized])
    assert made is not None
    return (made[0],)
