"""No kernel of a card reads or writes beside its tensors, whatever their shapes."""

import os
import signal
import subprocess
import sys

import pytest
from checkout import ROOT, SUPPORT

CASES = {"attention": 9, "small": 8, "products": 7, "mixture": 4, "adapters": 6}


def run(kind: str, seed: int, num_cases: int) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    command = [sys.executable, str(SUPPORT / "guarded.py"), kind, str(seed), str(num_cases)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", CASES)
def test_launches_on_odd_shapes_touch_nothing_beside_their_tensors(kind: str):
    result = run(kind, 1, CASES[kind])

    *lines, last = result.stdout.splitlines() or [""]
    assert result.returncode == 0, f"{last}: ended by {result.returncode}; {result.stderr[-500:]}"
    assert int(last.removeprefix("launches=")) >= len(lines)


def test_a_kernel_that_reads_one_number_too_many_would_be_seen():
    result = run("stray", 1, 1)

    assert result.returncode == -signal.SIGSEGV
    assert result.stdout.splitlines() == ["stray tensors end at a guard page"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("kind", CASES)
def test_many_more_launches_touch_nothing_beside_their_tensors(kind: str, seed: int):
    result = run(kind, seed, 4 * CASES[kind])

    assert result.returncode == 0, f"{result.stdout.splitlines()[-1]}: ended by {result.returncode}"
