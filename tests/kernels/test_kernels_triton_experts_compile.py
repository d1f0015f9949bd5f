"""Mixtures of experts by the kernels of a card: compiled for one, and launched without reading from it."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from card_experts import HIDDEN, layer_of
from torch import Tensor

from bench.gpu.listing.compiled import compile_launch
from bench.gpu.listing.recorded import Launch, recorded
from tightrope.kernels.forms.column_stack import ColumnStack
from tightrope.kernels.forms.columns import ColumnMatrix
from tightrope.kernels.forms.layer import StackedExperts
from tightrope.kernels.triton import experts as compiled

pytestmark = pytest.mark.slow

SHARED_BYTES = 99 * 1024  # that a program can have on an RTX 3090 or 4090


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Launch]]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with recorded() as found:
        yield found


def away(value: object) -> object:
    """A matrix, stack or tensor where nothing can be read."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        return tuple(map(away, value))
    if isinstance(value, ColumnStack | ColumnMatrix | StackedExperts):
        return replace(value, **{field.name: away(getattr(value, field.name)) for field in fields(value)})
    return value


@pytest.mark.parametrize(
    ("kind", "activations", "capability"),
    [
        ("plain", torch.bfloat16, 90),
        ("gptq", torch.float16, 86),
        ("exl2", torch.float16, 90),
        ("nf4", torch.bfloat16, 86),
    ],
)
def test_experts_compile_and_are_launched_without_reading_from_the_card(
    launches: list[Launch], kind: str, activations: torch.dtype, capability: int
):
    """Else no graph could record them."""
    layer = away(layer_of(kind)[0])
    assert isinstance(layer, StackedExperts)
    if kind == "plain":
        layer = replace(layer, gate_up=layer.gate_up.to(activations), down=layer.down.to(activations))  # type: ignore[union-attr]  # plain
    x = torch.zeros(3, HIDDEN, dtype=activations, device="meta")

    found = compiled.experts(
        x, layer, torch.zeros(3, 2, dtype=torch.int64, device="meta"), torch.zeros(3, 2, device="meta")
    )

    assert found.shape == x.shape
    assert {launch.name for launch in launches} >= {
        "share_out",
        "grouped_plain" if kind == "plain" else "sum_parts",
    }
    limit = SHARED_BYTES if capability == 86 else 227 * 1024
    assert max(compile_launch(launch, capability).shared for launch in launches) <= limit
