"""A checkout whose C++ kernels are not built, or were built from other sources: start and `doctor` say so."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ADAPTERS, ROOT
from real_server import clean_environment, run_server

from tightrope.kernels.cpu import native

OF_ANOTHER_VERSION = "int tightrope_instruction_set(void) { return 0; } int tightrope_interface(void) { return 1; }"


@pytest.fixture
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The sources without what is built of them, or with what would have been built of older ones."""
    for floor in ("server", "engine", "backends", "kernels", "tightrope"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / floor, tmp_path / floor, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if request.param == "stale":
        (tmp_path / "old.c").write_text(OF_ANOTHER_VERSION)
        built = tmp_path / "kernels" / native.build_path("portable").name
        subprocess.run(["cc", "-shared", "-fPIC", "-o", built, tmp_path / "old.c"], check=True)
    return tmp_path


def reason(checkout: Path) -> str:
    built = checkout / "kernels" / native.build_path("portable").name
    if built.exists():
        return f"{built} is of another version: its interface is 1, not {native.INTERFACE}"
    return "the C++ kernels are not built"


def remedy(checkout: Path) -> str:
    return f"to mend it: make -f kernels/cpu/build.mk PYTHON={sys.executable} in {checkout}"


@pytest.mark.parametrize("checkout", ["none", pytest.param("stale", marks=pytest.mark.slow)], indirect=True)
def test_a_folder_is_served_and_a_line_at_the_start_says_what_is_slow_and_how_to_mend_it(checkout: Path):
    options = (str(ADAPTERS / "llama-bf16"), "--device=cpu", "--max-model-len=64")
    with run_server(*options, cwd=checkout, environment={"PYTHONPATH": str(checkout)}) as running:
        lines = running.output.splitlines()

    (line,) = [line for line in lines if line.startswith("slow ")]
    assert line.startswith("slow      torch computes what C++ would, which takes ")
    assert line.endswith(f": {reason(checkout)}; {remedy(checkout)}")
    assert "note      kernels: torch reference" in lines


@pytest.mark.parametrize("checkout", ["none"], indirect=True)
def test_a_gguf_file_is_left_to_llama_cpp_and_a_line_at_the_start_says_so(checkout: Path):
    options = ("--ctx-size=256", "--device=cpu")
    with run_server(*options, cwd=checkout, environment={"PYTHONPATH": str(checkout)}) as running:
        lines = running.output.splitlines()

    slow = "slow      neither the sampler nor the torch engine has its C++ kernels: "
    assert f"{slow}{reason(checkout)}; {remedy(checkout)}" in lines
    why = "the torch engine is slow without C++ kernels; tightrope doctor says why none run"
    assert f"note      engine: llama.cpp runs this GGUF file, as {why}" in lines


@pytest.mark.parametrize("checkout", ["stale"], indirect=True)
def test_doctor_tells_it_and_ends_with_status_1(checkout: Path):
    line = [sys.executable, "-m", "tightrope", "doctor", "--device", "cpu"]
    environment = clean_environment() | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=checkout, timeout=600)

    assert done.returncode == 1
    said = f"cpu: {reason(checkout)}; {remedy(checkout)}"
    assert said in done.stderr.splitlines()[-1]
    kernels = [line for line in done.stdout.splitlines() if line.startswith("kernels ")]
    assert kernels == [f"kernels    cpu: torch reference; {said.removeprefix('cpu: ')}"]
    assert "FAILS" not in done.stdout
