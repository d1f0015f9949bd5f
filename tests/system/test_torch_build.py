"""Which build of torch is installed: the script, run in an environment of its own, from indexes on this machine."""

import hashlib
import os
import socket
import subprocess
import threading
import venv
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkout import ROOT

SCRIPT = ROOT / ".ci/torch_build.py"
VERSION = "2.13.0"


def write_wheel(folder: Path, version: str, cuda: str | None) -> None:
    """A torch of two files, which tells its build as the real one does."""
    info = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": "",
        "torch/version.py": f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sums = {
        name: urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=") for name, text in files.items()
    }
    record = "".join(f"{name},sha256={sums[name].decode()},{len(text)}\n" for name, text in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            wheel.writestr(name, text)


class Quiet(SimpleHTTPRequestHandler):
    """Folders, listed as indexes are."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the indexes `own` (torch's, for CPUs), `pip` and `pip-cpu`, and `empty`."""
    folder = tmp_path_factory.mktemp("indexes")
    write_wheel(folder / "own/torch", f"{VERSION}+cpu", None)
    write_wheel(folder / "pip/torch", VERSION, "13.0")
    write_wheel(folder / "pip-cpu/torch", VERSION, None)
    (folder / "empty/torch").mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of an environment with nothing but pip."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


class Installation:
    """Runs the script in that environment, which has no torch at first."""

    def __init__(self, python: Path, index: str) -> None:
        self.python, self.index = python, index
        self.constraints = python.parent / "constraints.txt"
        self.constraints.write_text(f"torch=={VERSION}\n")
        self.environment = {
            "PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1",
            "PIP_INDEX_URL": f"{index}/pip", "TORCH_INDEX": f"{index}/own",
        }  # fmt: skip
        self.command(python, "-m", "pip", "uninstall", "--yes", "torch")

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)

    def run(self, device: str, *more: str, status: int = 0) -> list[str]:
        """What it tells a person."""
        result = self.command(self.python, SCRIPT, device, self.constraints, *more)
        assert result.returncode == status, result.stdout + result.stderr
        return [line for line in result.stdout.splitlines() if line.startswith("torch: ")]

    def found(self) -> str:
        code = "import torch.version as v; print(v.__version__, v.cuda)"
        return self.command(self.python, "-c", code).stdout.strip()


@pytest.fixture
def installation(python: Path, index: str) -> Installation:
    return Installation(python, index)


def test_without_a_card_the_build_for_cpus_comes_from_torchs_own_index(installation: Installation):
    assert installation.run("cpu") == [f"torch: {VERSION}+cpu, for CPUs"]
    assert installation.found() == f"{VERSION}+cpu None"
    assert installation.run("cpu") == [f"torch: {VERSION}+cpu, for CPUs"]  # and is left in place


@pytest.mark.parametrize("answer", ["refused", "silent", "none"])
def test_where_that_index_gives_none_what_pip_finds_is_taken(installation: Installation, answer: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # It takes connections, and nobody answers on them.
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if answer == "refused":
            listener.close()
        installation.environment["TORCH_INDEX"] = f"{installation.index}/empty" if answer == "none" else url

        said = installation.run("cpu")

    assert said[-1] == f"torch: {VERSION}, for CUDA 13.0"
    assert len(said) == 2
    assert ("has no build for this machine" if answer == "none" else "doesn't answer") in said[0]


def test_for_a_card_the_build_for_cpus_makes_room_for_the_one_for_cuda(installation: Installation):
    installation.run("cpu")

    assert installation.run("cuda", "must")[-1] == f"torch: {VERSION}, for CUDA 13.0"
    assert installation.found() == f"{VERSION} 13.0"


def test_and_back(installation: Installation):
    installation.run("cuda")

    assert installation.run("cpu") == [f"torch: {VERSION}+cpu, for CPUs"]


@pytest.mark.parametrize(("more", "status"), [((), 0), (("must",), 1)])
def test_no_build_for_a_card_is_told_and_fails_where_it_was_asked_for(
    installation: Installation, more: tuple[str, ...], status: int
):
    installation.environment["PIP_INDEX_URL"] = f"{installation.index}/pip-cpu"

    (line,) = installation.run("cuda", *more, status=status)

    assert line.startswith(
        f"torch: what pip finds, {VERSION}, is for CPUs; name an index with a build for CUDA: PIP_EX"
    )


@pytest.mark.parametrize(("device", "line"), [("cuda", "torch_build.py $(cat .venv/device)"), ("tpu", "")])
def test_make_knows_two_devices(device: str, line: str):
    command = ["make", "--dry-run", "--always-make", f"DEVICE={device}", "serve"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    if device == "tpu":
        assert result.returncode != 0
        assert "DEVICE is cpu or cuda, not tpu" in result.stderr
    else:
        assert f"{line} .ci/constraints.txt cuda" in result.stdout
