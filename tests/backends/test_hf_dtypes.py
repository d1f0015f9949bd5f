"""What hidden states are held in, by device and wish, and that no product leaves it."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from checkout import ADAPTERS
from interpreted import interpreted
from torch import Tensor

from bench.gpu.matrices import random_nf4
from tightrope.backends.detect import outline
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.model_file import notes_on, read_model
from tightrope.backends.hf.load.blueprint import activation_dtype
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.modules.matrices import Columns, Matrix, Mixed, times
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import Dtype, ModelSettings
from tightrope.kernels import dispatch
from tightrope.kernels.forms.columns import to_columns

CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("asked", "stored", "dtype"),
    [
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.float16),
        ("auto", "float32", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),
        ("float16", "float32", torch.float16),
    ],
)
def test_hidden_states_on_a_card_have_at_most_sixteen_bits_unless_more_are_asked_for(
    asked: Dtype, stored: str, dtype: torch.dtype
):
    assert activation_dtype(asked, stored, CARD) == dtype
    assert activation_dtype(asked, stored, CPU) == torch.float32


@pytest.mark.quick
def test_an_old_card_has_no_bfloat16_and_a_line_says_what_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, taken in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert activation_dtype("auto", "bfloat16", CARD) == activation_dtype("auto", "float32", CARD) == taken
        assert activation_dtype("auto", "float16", CARD) == torch.float16
        assert activation_dtype("float32", "bfloat16", CARD) == torch.float32
        notes = inspect(ADAPTERS / "llama-bf16", ModelSettings(), CARD).notes
        assert notes == (("dtype: float16, as the card has no bfloat16",) if taken == torch.float16 else ())
        assert not inspect(ADAPTERS / "llama-bf16", ModelSettings(dtype="float16"), CARD).notes

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendError, match=r"^--dtype bfloat16: the card has none; take float16$"):
        activation_dtype("bfloat16", "float16", CARD)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"matmul_sums": "float16"}, "--matmul-sums float16"),
    ],
)
def test_what_only_a_card_has_changes_nothing_elsewhere_and_a_line_says_so(changed: dict[str, Any], option: str):
    settings = ModelSettings(**changed)

    (line,) = inspect(ADAPTERS / "llama-bf16", settings).notes
    assert line == f"{option} changes nothing: on a CPU hidden states and sums are float32"
    assert not inspect(ADAPTERS / "llama-bf16", settings, "meta").notes
    assert notes_on(settings) == (f"{option} changes nothing: llama.cpp has types of its own",)
    assert read_model(bundled_model(), settings).tensors
    for path, told in ((ADAPTERS / "llama-bf16", line), (bundled_model(), notes_on(settings)[0])):
        settings = ModelSettings(model=str(path), device="cpu", gguf_engine="llama.cpp", **changed)
        chosen = outline(settings, None).chosen
        assert chosen is not None
        assert told in chosen.notes


@pytest.mark.quick
def test_sums_that_only_a_cpu_has_change_nothing_elsewhere_and_a_line_says_so():
    settings = ModelSettings(batch_invariant=True)

    assert not inspect(ADAPTERS / "llama-bf16", settings).notes
    assert inspect(ADAPTERS / "llama-bf16", settings, "meta").notes == (
        "--batch-invariant changes nothing: only a CPU has such sums",
    )
    assert notes_on(settings) == ("--batch-invariant changes nothing: llama.cpp has sums of its own",)


@pytest.fixture(scope="module")
def quantized() -> Iterator[ModuleType]:
    with interpreted("quantized") as module:
        yield module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_different_dtypes_are_joined_in_that_of_the_hidden_states(
    quantized: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    from tightrope.kernels.triton import ops  # The interpreter's, as this one has been imported meanwhile.

    monkeypatch.setattr(dispatch, "_kernels_for", lambda x: ops)
    monkeypatch.setattr(dispatch, "column_linear", quantized.quantized_linear)
    weight = torch.randn(8, 64) / 8
    parts: list[Matrix] = [weight.bfloat16(), weight.half(), weight, Columns((to_columns(random_nf4(64, 16, 32)),))]
    x = torch.randn(3, 64).to(dtype)

    found = Mixed(tuple(parts)).times(x, torch.randn(40))

    assert found.dtype == dtype
    assert found.shape == (3, 40)
    wanted: Tensor = x.float() @ weight.t()
    for i in range(3):
        torch.testing.assert_close(times(x, parts[i], None).float(), wanted, rtol=2e-2, atol=2e-2)
