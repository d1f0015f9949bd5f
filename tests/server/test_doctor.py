"""`tightrope doctor` on this machine, and on one with a card that can't be used."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_server import clean_environment

from tightrope.backends import doctor
from tightrope.backends.devices.host import Host
from tightrope.backends.doctor import Examination
from tightrope.backends.settings import EmbeddingSettings, ModelSettings
from tightrope.kernels import dispatch
from tightrope.server.cli import doctor as command
from tightrope.server.cli.failures import CommandFailed

BROKEN = Host(
    True, "535.183.01", ("NVIDIA GeForce RTX 4090",), (Path("/dev/null"),), has_memory_node=True, is_wsl=False
)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tightrope", "doctor", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=clean_environment(), timeout=600)


def test_it_tells_what_there_is_and_tries_every_kernel():
    done = run_command("--device", "cpu")

    assert done.returncode == 0, done.stderr
    lines = [re.split(r" +", line, maxsplit=1) for line in done.stdout.splitlines()]
    about = [line[0] for line in lines]
    for name in ("machine", "card", "python", "torch", "triton", "llama.cpp", "exllamav2", "gcc", "nvcc", "device"):
        assert about.count(name) == 1, name
    assert ["kernels", f"cpu: {dispatch.describe()}"] in lines
    assert about.count("works") > 20
    assert "FAILS" not in about
    assert all(len(line) == 2 and line[1] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--device", "gpu"], 2, "--device: should be auto, cpu, cuda, or cuda:N for one card of several, not 'gpu'"),
        (["--device", "cuda:x"], 2, "not 'cuda:x'"),
        (["model.gguf"], 2, "unrecognized arguments: model.gguf"),
    ],
)
def test_what_it_cannot_understand_is_one_line(arguments: list[str], status: int, words: str):
    done = run_command(*arguments)

    assert done.returncode == status
    assert done.stdout == ""
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.quick
def test_a_card_that_cannot_be_used_is_told_and_the_cpus_kernels_are_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    examination = Examination(ModelSettings(), BROKEN)
    lines = list(examination.lines())

    assert ("card", "NVIDIA GeForce RTX 4090; 1 device files") in lines
    assert ("driver", "535.183.01") in lines
    [device] = [what for about, what in lines if about == "device"]
    assert device.startswith("cpu; cuda:0 can't be used: its driver 535.183.01 is too old for torch")
    assert [about for about, _ in lines].count("works") > 20
    assert len(examination.faults) == 1


@pytest.mark.quick
@pytest.mark.parametrize(("asked", "num_faults"), [("auto", 0), ("cpu", 0), ("cuda", 1), ("cuda:3", 1)])
def test_a_missing_card_is_a_fault_where_it_is_asked_for(asked: str, num_faults: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "run_all", lambda device: [])
    nothing = replace(BROKEN, has_card=False, driver=None, names=(), nodes=())

    examination = Examination(ModelSettings(device=asked), nothing)

    lines = list(examination.lines())

    assert ("card", "none of NVIDIA's") in lines
    assert (("device", "cpu") in lines) is (num_faults == 0)
    assert len(examination.faults) == num_faults


@pytest.mark.quick
def test_a_kernel_that_fails_ends_the_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(*given: object) -> None:
        raise RuntimeError("illegal instruction\nat 0x0")

    monkeypatch.setattr(dispatch, "gated", fails)
    monkeypatch.setattr(dispatch, "rms_norm", fails)

    with pytest.raises(CommandFailed) as caught:
        command.doctor(ModelSettings(device="cpu"))

    assert str(caught.value) == ("cpu: gated activation: RuntimeError: illegal instruction; and 1 more, see above")
    assert capsys.readouterr().out.count("FAILS") == 2


def test_models_that_embed_are_run_once_where_they_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from vector_api import embedding  # here, since the models' libraries take seconds to import

    monkeypatch.setattr(doctor, "run_all", lambda device: [])
    settings = ModelSettings(device="cpu", embedding=embedding("file.gguf", "ranker"))

    examination = Examination(settings)
    works = [what for about, what in examination.lines() if about == "works"]

    assert [line.split(",")[0] for line in works] == ["file: vectors of 32 numbers", "ranker: ranks texts"]
    assert examination.faults == []
    (tmp_path / "broken.gguf").write_text("no model")
    models = EmbeddingSettings(models=(str(tmp_path / "broken.gguf"),))
    examination = Examination(ModelSettings(device="cpu", embedding=models))
    assert "FAILS" in dict(examination.lines())
    (fault,) = examination.faults
    assert fault.startswith("--embedding-model: ")
    assert "broken.gguf: not a GGUF file" in fault
