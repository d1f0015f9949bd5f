"""Trying out each kind of kernel: all of this machine's hold, and one that is wrong, or doesn't run, is named."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from interpreted import interpreted

from tightrope.kernels import dispatch, reference
from tightrope.kernels.cpu import native
from tightrope.kernels.trial import cases, run
from tightrope.kernels.trial.run import BOUND, Trial, launch, run_all

CPU = torch.device("cpu")


@pytest.mark.quick
@pytest.mark.parametrize("build", native.usable() or ["none"])
def test_all_kernels_of_every_build_hold(build: str, monkeypatch: pytest.MonkeyPatch):
    built = native.NativeKernels(build)
    monkeypatch.setattr(dispatch, "_native", lambda: built)
    monkeypatch.setattr(dispatch, "_cpu", lambda: built)

    found = list(run_all(CPU))

    assert [trial.describe() for trial in found if not trial.holds] == []
    assert [trial.kernel for trial in found] == [name for name, _ in cases.cases(on_card=False)]


@pytest.mark.quick
def test_no_kernel_of_a_cpu_is_left_out(monkeypatch: pytest.MonkeyPatch):
    called = set()
    kernels = {name for name in vars(native.NativeKernels) if not name.startswith("_")}
    kernels -= {"describe", "gather"}  # Ranks meet in the latter, which copies and computes nothing.

    def counting(name: str, kernel: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            called.add(name)
            return kernel(*given)

        return call

    for name in kernels:
        monkeypatch.setattr(dispatch, name, counting(name, getattr(dispatch, name)))
    list(run_all(CPU))

    assert called == kernels


@pytest.mark.quick
def test_the_reference_has_all_but_what_runs_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_native", lambda: None)
    monkeypatch.setattr(dispatch, "_cpu", lambda: reference)

    found = list(run_all(CPU))

    assert all(trial.holds for trial in found)
    every = {name for name, _ in cases.cases(on_card=False)}
    assert every - {trial.kernel for trial in found} == {
        "plain experts", "quantized experts", "whole layer", "draw", "GGUF blocks"
    }  # fmt: skip


@pytest.mark.plain
def test_all_kernels_of_a_card_hold_in_tritons_interpreter(monkeypatch: pytest.MonkeyPatch):
    flash = []
    with interpreted("ops") as ops:
        attention = sys.modules["tightrope.kernels.triton.attention"]
        expanded = attention.attend_expanded
        monkeypatch.setattr(attention, "attend_expanded", lambda *given: (flash.append(given), expanded(*given)))
        monkeypatch.setattr(dispatch, "_kernels_for", lambda x: ops)
        found = [run.run_one(name, case, CPU) for name, case in cases.cases(on_card=True) if "exllamav2" not in name]

    assert [trial and trial.describe() for trial in found if trial is None or not trial.holds] == []
    assert len(found) > 20
    assert len(flash) == 3  # Prompts of each type of cache; a window and decode have kernels of their own.


@pytest.mark.quick
@pytest.mark.parametrize("wrong", [2.0, math.nan])
def test_a_kernel_that_computes_something_else_is_named(wrong: float, monkeypatch: pytest.MonkeyPatch):
    right = dispatch.rms_norm
    monkeypatch.setattr(dispatch, "rms_norm", lambda *given: right(*given) * wrong)

    failing = [trial for trial in run_all(CPU) if not trial.holds]

    assert [trial.kernel for trial in failing] == ["norm"]
    assert failing[0].describe() == f"norm: off by {'nan' if math.isnan(wrong) else 1}, at most {BOUND:g}"


@pytest.mark.quick
def test_a_kernel_that_does_not_run_is_named_with_its_error_and_the_others_run(monkeypatch: pytest.MonkeyPatch):
    def fails(*given: object) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(dispatch, "rotate", fails)

    found = list(run_all(CPU))

    assert [trial.describe() for trial in found if not trial.holds] == [
        "rotation: RuntimeError: no kernel image is available"
    ]
    assert len(found) > 20


@pytest.mark.quick
def test_one_launch_is_the_smallest_kernel_and_raises_what_it_raises(monkeypatch: pytest.MonkeyPatch):
    assert launch(CPU).holds

    def fails(*given: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(dispatch, "gated", fails)
    with pytest.raises(OSError, match="no compiler"):
        launch(CPU)


@pytest.mark.quick
def test_an_error_of_just_the_bound_holds():
    assert Trial("norm", BOUND, 0.0).holds
    assert not Trial("norm", BOUND * 1.01, 0.0).holds
    assert not Trial("norm", 0.0, 0.0, "OSError: no compiler").holds
