"""The CUDA kernels of quantized matrices through Triton's compiler, and launched without reading from the card."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from gguf_rows import random_rows
from torch import Tensor

from bench.gpu.listing.compiled import compile_launch
from bench.gpu.listing.recorded import Launch, recorded
from bench.gpu.matrices import random_matrix, random_nf4
from tightrope.backends.quant.gguf import to_matrix
from tightrope.kernels.forms.columns import ColumnMatrix, to_columns
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix
from tightrope.kernels.triton import quantized

pytestmark = pytest.mark.slow

SHARED_BYTES = 99 * 1024  # that a program can have on an RTX 3090 or 4090
BLOCKS = ("Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS")  # One of each way in which scales lie.
MATRICES: dict[str, QuantizedMatrix | Nf4Matrix] = {
    "exl2": random_matrix([32, 32], [5, 4], 64, is_coded=True, is_permuted=True),
    "exl2 of 3 bits": random_matrix([64], [3], 64, is_coded=True),
    "gptq of act-order": random_matrix([64], [4], 64, has_zeros=True, is_permuted=True),
    "gptq of 8 bits": replace(random_matrix([64], [8], 64), scales=torch.ones(4, 1, 16)),
    "nf4": random_nf4(64, 64, 64),
    **{kind: to_matrix(kind, torch.from_numpy(random_rows(kind, 64, 256, 0)), 256) for kind in BLOCKS},
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Launch]]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with recorded() as found:
        yield found


@pytest.mark.parametrize(
    ("name", "activations", "capability"),
    [
        ("exl2", torch.float16, 90),
        ("exl2 of 3 bits", torch.bfloat16, 86),
        ("gptq of act-order", torch.float16, 86),
        ("gptq of 8 bits", torch.float16, 90),
        ("nf4", torch.bfloat16, 86),
        *((kind, torch.float16, 86) for kind in BLOCKS),
        ("Q6_K", torch.bfloat16, 90),
    ],
)
def test_every_kind_of_matrix_compiles_for_any_number_of_rows(
    launches: list[Launch], name: str, activations: torch.dtype, capability: int
):
    matrix = to_columns(MATRICES[name])
    for rows in (1, 40, 65):
        x = torch.zeros(rows, matrix.num_inputs, dtype=activations)
        quantized.quantized_linear(x, [matrix], torch.zeros(64))

    kernels = [launch.name for launch in launches]
    assert kernels == ["vector_parts", "sum_parts", "batch_parts", "sum_parts", "expand_columns"]
    limit = SHARED_BYTES if capability == 86 else 227 * 1024
    assert max(compile_launch(launch, capability).shared for launch in launches) <= limit


def away(matrix: ColumnMatrix) -> ColumnMatrix:
    """The matrix where no tensor can be read."""
    values = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
    return replace(matrix, **{name: v.to("meta") for name, v in values.items() if isinstance(v, Tensor)})


@pytest.mark.parametrize("rows", [1, 8, 65])
@pytest.mark.parametrize("name", MATRICES)
def test_a_product_is_launched_without_reading_from_the_card(launches: list[Launch], name: str, rows: int):
    """Else no graph could record it, and each step would wait."""
    matrices = [away(to_columns(MATRICES[name]))] * 2

    x = torch.zeros(rows, matrices[0].num_inputs, dtype=torch.float16, device="meta")
    found = quantized.quantized_linear(x, matrices, torch.zeros(128, device="meta"))

    assert found.shape == (rows, 128)
    assert len(launches) == (2 if rows > quantized.MOST_ROWS else 4)
