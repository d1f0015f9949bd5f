"""Which device a model runs on, and what is said of a card that can't be used; torch's and the system's answers are
stand-ins."""

import errno
import importlib.metadata
import re
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tightrope.backends.devices import faults, toolchain
from tightrope.backends.devices.choice import choose_device, describe_card
from tightrope.backends.devices.host import Host, look
from tightrope.backends.errors import BackendError
from tightrope.kernels.trial.run import Trial

pytestmark = pytest.mark.quick

CARD = "NVIDIA GeForce RTX 3090"
CPU = torch.device("cpu")
WORKS = Trial("gated activation", 1e-4, 0.1)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine with one card and all that its driver puts there."""
    node = tmp_path / "nvidia0"
    node.touch()
    return Host(True, "580.65.06", (CARD,), (node,), has_memory_node=True, is_wsl=False)


NOTHING = Host(False, None, (), (), has_memory_node=False, is_wsl=False)


@dataclass
class Driver:
    """torch.cuda as it answers where it was built for CUDA; `chosen` is the thread's card."""

    count: int = 1
    chosen: torch.device | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch, version: str = "13.0") -> None:
        answers: dict[str, Callable[..., object]] = {
            "is_available": lambda: self.count > 0,
            "device_count": lambda: self.count,
            "get_device_capability": lambda device: (8, 6),
            "get_device_name": lambda device: CARD,
            "get_arch_list": lambda: ["sm_80", "sm_90"],
            "mem_get_info": lambda device: (23 << 30, 24 << 30),
            "set_device": lambda device: setattr(self, "chosen", device),
            "init": _no_cards,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch, "__version__", f"2.13.0+cu{version.replace('.', '')}")
        monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
        monkeypatch.setattr(faults.trial, "launch", lambda device: WORKS)


def _no_cards() -> None:
    raise RuntimeError("No CUDA GPUs are available\nand more lines")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    found.install(monkeypatch)
    return found


def said(host: Host, caplog: pytest.LogCaptureFixture, asked: str = "cuda") -> str:
    """Why the card can't be used: what asking for it raises, and what auto logs once before it takes the CPU."""
    with pytest.raises(BackendError) as caught:
        choose_device(asked, host)
    line = str(caught.value)
    assert line.startswith(f"--device {asked}: ")
    assert "\n" not in line
    caplog.clear()
    assert choose_device("auto", host) == CPU
    if asked == "cuda":
        assert len(caplog.records) == host.has_card
        assert all(line.removeprefix("--device cuda: ") in record.getMessage() for record in caplog.records)
    return line


# ---- what the files of a system tell ----


def write(root: Path, **files: str) -> None:
    """Files by their paths, with __ for /."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_machine_without_a_card_has_none(tmp_path: Path):
    write(tmp_path, sys__bus__pci__devices__0__vendor="0x8086\n", sys__bus__pci__devices__0__class="0x030000\n")
    write(tmp_path, sys__bus__pci__devices__1__vendor="0x10de\n", sys__bus__pci__devices__1__class="0x040300\n")

    assert look(tmp_path) == NOTHING  # The second is the sound of a card whose rest was given to a virtual machine.


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (builder@host-1.2)\n",
    ],
)
def test_the_driver_is_told_by_its_own_files(line: str, tmp_path: Path):
    write(tmp_path, proc__driver__nvidia__version=line, dev__nvidia0="", dev__nvidiactl="")
    (tmp_path / "dev/nvidia-uvm").touch()
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information").write_text(f"Model: \t\t {CARD}\nIRQ:   \t 31\n")

    assert look(tmp_path) == Host(
        True, "535.183.01", (CARD,), (tmp_path / "dev/nvidia0",), has_memory_node=True, is_wsl=False
    )


def test_a_card_without_a_driver_shows_on_the_bus(tmp_path: Path):
    write(tmp_path, sys__bus__pci__devices__0__vendor="0x10de\n", sys__bus__pci__devices__0__class="0x030200\n")

    assert look(tmp_path) == replace(NOTHING, has_card=True)


def test_windows_driver_shows_in_its_linux(tmp_path: Path):
    write(tmp_path, dev__dxg="", usr__lib__wsl__lib__libcuda="")
    assert not look(tmp_path).has_card  # Every WSL2 has the first.

    (tmp_path / "usr/lib/wsl/lib/libcuda.so.1").touch()

    assert look(tmp_path) == replace(NOTHING, has_card=True, is_wsl=True)


# ---- a card that works ----


def test_auto_takes_the_card_and_says_nothing(driver: Driver, host: Host, caplog: pytest.LogCaptureFixture):
    assert choose_device("auto", host) == torch.device("cuda", 0)
    assert driver.chosen == torch.device("cuda", 0)
    assert not caplog.records


@pytest.mark.parametrize(("asked", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_one_card_of_several_is_this_threads(driver: Driver, host: Host, asked: str, index: int):
    driver.count = 2

    assert choose_device(asked, host) == driver.chosen == torch.device("cuda", index)


@pytest.mark.usefixtures("driver")
def test_cpu_is_the_cpu_beside_a_card(host: Host):
    assert choose_device("cpu", host) == CPU


@pytest.mark.usefixtures("driver")
def test_a_card_is_described_in_one_line(host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.7.1")

    assert describe_card(torch.device("cuda", 0), host) == (
        f"cuda:0, {CARD} (sm_86), 23.0 of 24.0 GiB free; driver 580.65.06, CUDA 13.0, Triton 3.7.1"
    )


# ---- one that doesn't ----


@pytest.mark.parametrize(
    ("count", "there"), [(1, "torch finds 1 card, cuda:0"), (3, "torch finds 3 cards, cuda:0 to cuda:2")]
)
def test_a_card_that_there_is_not_is_told_beside_those_that_there_are(
    driver: Driver, host: Host, count: int, there: str
):
    driver.count = count

    with pytest.raises(BackendError, match=f"^--device cuda:9: {there}$"):
        choose_device("cuda:9", host)


@pytest.mark.parametrize("asked", ["cuda", "cuda:1"])
def test_a_torch_without_cuda_beside_a_card_is_told(
    host: Host, asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert said(host, caplog, asked).endswith(
        ": torch 2.13.0+cpu is built without CUDA: install torch's build for CUDA, as make serve DEVICE=cuda does"
    )


@pytest.mark.parametrize("version", ["13.0", None])  # Another build of torch, of several GB, would be of no use.
def test_without_a_card_auto_says_nothing_and_cuda_refuses(
    driver: Driver, version: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    driver.count = 0
    monkeypatch.setattr(torch.version, "cuda", version)

    assert said(NOTHING, caplog) == "--device cuda: there is no NVIDIA card on this machine"


@pytest.mark.parametrize(
    ("built", "installed", "help"),
    [
        (
            "13.0",
            "570.86.15",
            "driver 580 or newer (nvidia-driver-580 on Debian and Ubuntu), or a torch built for CUDA 12",
        ),
        ("13.0", "535.183.01", "or a torch built for CUDA 12"),
        ("12.8", "470.256.02", "driver 525 or newer (nvidia-driver-525 on Debian and Ubuntu)"),
        ("14.1", "535.183.01", "driver 580 or newer"),
    ],
)
def test_a_driver_older_than_torchs_build_is_told_with_what_would_do(
    host: Host, built: str, installed: str, help: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    Driver(count=0).install(monkeypatch, built)

    line = said(replace(host, driver=installed), caplog)

    assert f"its driver {installed} is too old for torch 2.13.0+cu{built.replace('.', '')}" in line
    assert f"which is built for CUDA {built}: install " in line
    assert help in line


def test_what_else_keeps_torch_from_a_card_is_told(
    driver: Driver, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    driver.count = 0

    assert "no NVIDIA driver is loaded: install driver 580 or newer" in said(replace(host, driver=None), caplog)
    assert "start the container with --gpus all" in said(replace(host, nodes=()), caplog)
    assert "modprobe nvidia-uvm" in said(replace(host, has_memory_node=False), caplog)
    words = "torch finds none: No CUDA GPUs are available (CUDA_VISIBLE_DEVICES may hide it)"
    assert words in said(host, caplog)
    assert words in said(replace(NOTHING, has_card=True, is_wsl=True), caplog)
    monkeypatch.setattr(faults.os, "access", lambda path, mode: False)
    group = host.nodes[0].group()
    assert f"{host.nodes[0]} may not be opened by this user: add the user to the group {group}" in said(host, caplog)


def test_a_torch_built_for_other_cards_is_told(
    driver: Driver, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_image(*shape: int, device: torch.device) -> None:
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"
        )

    monkeypatch.setattr(torch, "ones", no_image)

    assert (
        f"torch 2.13.0+cu130, built for sm_80 sm_90, fails on {CARD} (sm_86): CUDA error: no kernel image is available "
        "for execution on the device" in said(host, caplog)
    )


@pytest.mark.usefixtures("driver")
def test_a_card_at_which_cuda_can_not_begin_is_told_without_torchs_warnings(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def deferred(device: torch.device) -> None:
        warnings.warn("Found GPU0 which is of cuda capability 3.5.\nMinimum is 7.5", UserWarning, stacklevel=2)
        raise torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization with error: unknown\n\nCUDA")

    monkeypatch.setattr(torch.cuda, "get_device_capability", deferred)

    assert "fails on cuda:0: CUDA call failed lazily at initialization with error: unknown" in said(host, caplog)


def failing_launch(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def launch(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(faults.trial, "launch", launch)


@pytest.mark.usefixtures("driver")
def test_a_missing_triton_is_told_with_the_version_that_torch_asks_for(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    failing_launch(monkeypatch, ModuleNotFoundError("No module named 'triton'", name="triton"))
    wanted = ["filelock", 'triton==3.7.1; platform_system == "Linux" and platform_machine == "x86_64"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)

    assert "Triton is not installed: pip install triton==3.7.1" in said(host, caplog)


NO_HEADER = subprocess.CalledProcessError(1, ["gcc", "main.c"])


@pytest.mark.usefixtures("driver")
def test_missing_headers_and_compilers_are_told_with_the_package_that_has_them(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    failing_launch(monkeypatch, NO_HEADER)
    header = tmp_path / "python3.12/Python.h"
    monkeypatch.setattr(toolchain, "python_header", lambda: header)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    package = r"python3\.\d+-dev \(Debian, Ubuntu\) or python3-devel \(Fedora\)$"
    assert re.search(rf"there is no {re.escape(str(header))}: install {package}", said(host, caplog))

    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)

    assert said(host, caplog).endswith("Triton can't launch a kernel: there is no C compiler: install gcc")


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nat"), "device kernel image is invalid"),
        (AssertionError("libcuda.so cannot found!\nPossible files are located"), "libcuda.so cannot found!"),
        (NO_HEADER, "Command '['gcc', 'main.c']' returned non-zero exit status 1."),
        (PermissionError(13, "Permission denied", "/.triton"), "Permission denied: '/.triton'"),
    ],
)
def test_whatever_else_keeps_triton_from_launching_is_told_in_its_words(
    host: Host, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    failing_launch(monkeypatch, error)
    monkeypatch.setattr(toolchain, "missing", lambda: None)

    line = said(host, caplog)

    assert line.startswith("--device cuda: Triton can't launch a kernel: ")
    assert line.endswith(words)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "{}/VVRH"), "permission denied in {}"),
        (FileExistsError(errno.EEXIST, "File exists", "{}"), "file exists in {}"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device in {}"),
    ],
)
def test_a_folder_that_keeps_no_kernels_is_told_with_the_variable_that_names_another(
    host: Host, error: OSError, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from tightrope.kernels.triton import warming  # Triton is there for tests, and nowhere else without a card.

    folder = warming.cache_folder()
    if error.filename is not None:
        error.filename = error.filename.format(folder)
    failing_launch(monkeypatch, error)
    monkeypatch.setattr(toolchain, "missing", lambda: None)

    told = f"{reason.format(folder)}; set TRITON_CACHE_DIR to a folder that can be written"
    assert said(host, caplog).endswith(f"Triton can't launch a kernel: {told}")


@pytest.mark.usefixtures("driver")
def test_a_card_that_computes_wrong_numbers_is_not_used(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(faults.trial, "launch", lambda device: replace(WORKS, error=0.5))

    assert f"{CARD} (sm_86) computes wrong numbers: gated activation: off by 0.5, at most 0.01" in said(host, caplog)


def test_this_machines_own_tools_are_found():
    assert toolchain.c_compiler() is not None
    assert re.search(r"\d+\.\d+", toolchain.version_of("gcc") or "")
    assert toolchain.version_of("no-such-program") is None
    assert toolchain.version("torch") == torch.__version__
    assert toolchain.version("no-such-package") is None
    assert toolchain.python_header().name == "Python.h"
