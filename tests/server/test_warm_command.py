"""`tightrope warm`: a model's kernels compiled without a card, kept, and found again by the next process."""

import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from checkout import FORMATS
from real_server import clean_environment
from test_cli import bundled_model

from tightrope.backends import detect
from tightrope.backends.errors import BackendError
from tightrope.server.cli.failures import UsageError
from tightrope.server.cli.main import main
from tightrope.server.cli.warm import parse_architectures

TINY = FORMATS / "tiny" / "llama-gptq-4bit-32g-actorder"


@pytest.mark.parametrize("text", ["sm_85", "86", "ampere", "sm_86,", "sm_86;sm_89", ""])
def test_an_unknown_architecture_is_one_line_with_those_that_are_known(text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["warm", str(TINY), f"--arch={text}"]) == UsageError.status

    line = capsys.readouterr().err
    assert line.startswith("tightrope: --arch: ")
    assert line.endswith(" is none of sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120\n")
    assert line.count("\n") == 1


def test_several_architectures_may_be_named_and_each_counts_once():
    assert parse_architectures("sm_86, sm_89,sm_86") == [86, 89]
    assert parse_architectures(None) == []


def test_a_gguf_file_has_nothing_to_warm(capsys: pytest.CaptureFixture[str]):
    path = bundled_model()

    assert main(["warm", str(path), "--arch=sm_86"]) == 1
    assert capsys.readouterr().err == (
        f"tightrope: {path}: a GGUF file needs no warming: llama.cpp's kernels were compiled when it was built\n"
    )


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/dev/null/x", "not a directory in /dev/null/x; set TRITON_CACHE_DIR to a folder that can be written"),
        ("", "TRITON_CACHE_DIR is empty; set it to a folder that can be written"),
    ],
)
def test_a_folder_that_keeps_nothing_is_one_line(folder: str, reason: str):
    command = [sys.executable, "-m", "tightrope", "warm", str(TINY), "--arch=sm_86"]
    environment = {**clean_environment(), "TRITON_CACHE_DIR": folder}

    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr == f"tightrope: compiled kernels can't be kept: {reason}\n"


def test_a_model_of_the_hub_is_looked_for_where_it_is_downloaded_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[object, ...]] = []

    def locate(*names: object) -> Path:
        asked.append(names)
        raise BackendError("not here")

    monkeypatch.setattr(detect, "locate", locate)
    assert main(["warm", "org/name", "--arch=sm_86", "--revision=v1", f"--hub-cache={tmp_path}"]) == 1
    assert asked == [("org/name", "v1", str(tmp_path))]


def test_without_a_card_one_must_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert main(["warm", str(TINY)]) == 1
    line = capsys.readouterr().err
    assert line.startswith("tightrope: --arch: this machine has no card to compile for; name one: sm_75, sm_80, sm_86")
    assert line.count("\n") == 1


def test_without_triton_it_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "triton" else find_spec(name))

    assert main(["warm", str(TINY), "--arch=sm_86"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("tightrope: warm: Triton, which compiles kernels for cards, is not installed")
    assert line.count("\n") == 1


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["warm", str(tmp_path / "nothing"), "--arch=sm_86"]) == 1
    assert "no such file" in capsys.readouterr().err


def warm(folder: Path, cache: Path, *architectures: str) -> list[tuple[int, int]]:
    """Run the command as a process of its own; for each architecture, kernels in all and those compiled now."""
    command = [sys.executable, "-m", "tightrope", "warm", str(folder), f"--arch={','.join(architectures)}"]
    environment = {**clean_environment(), "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"kept in   {cache}" in result.stdout.splitlines()
    found = re.findall(r"^(sm_\d+) +(\d+) kernels, (\d+) of them compiled now$", result.stdout, re.MULTILINE)
    assert [name for name, _, _ in found] == list(architectures)
    return [(int(number), int(compiled)) for _, number, compiled in found]


@pytest.mark.slow
def test_a_second_process_compiles_nothing_that_the_first_has_compiled(tmp_path: Path):
    ((num_kernels, num_compiled),) = warm(TINY, tmp_path, "sm_86")
    again, other = warm(TINY, tmp_path, "sm_86", "sm_89")

    assert num_compiled == num_kernels > 10
    assert again == (num_kernels, 0)
    assert other == (num_kernels, num_kernels)


@pytest.mark.slow
def test_a_model_in_bfloat16_is_compiled_in_float16_for_a_card_that_has_no_other(tmp_path: Path):
    ((num_kernels, num_compiled),) = warm(FORMATS / "tiny" / "llama-exl2-mixed-h6", tmp_path, "sm_75")

    assert num_compiled == num_kernels > 10


def test_what_a_card_does_not_compute_in_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["warm", str(TINY), "--arch=sm_75", "--dtype=bfloat16"]) == 1
    assert capsys.readouterr().err == "tightrope: --dtype bfloat16: sm_75 has none; take float16\n"
