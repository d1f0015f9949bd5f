"""Triton's interpreter: kernels for CUDA run in numpy, on a CPU, if Triton is told so when it is imported."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def interpreted(module: str) -> Iterator[ModuleType]:
    """A module of kernels/triton with Triton, and all that uses it, imported anew; others keep theirs."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_triton(name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module(f"tightrope.kernels.triton.{module}")
    for name in list(filter(_is_triton, sys.modules)):
        sys.modules[f"interpreted.{name}"] = sys.modules.pop(name)  # kept: Python clears at its end what stands there
    sys.modules.update(before)


def _is_triton(name: str) -> bool:
    """Whether a module is Triton's or ours; compiled ones, which a process can load once, stay."""
    is_compiled = name.startswith("triton._C")
    return not is_compiled and (name.partition(".")[0] == "triton" or name.startswith("tightrope.kernels.triton"))
