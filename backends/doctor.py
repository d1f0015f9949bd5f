"""What this machine is, as far as models are concerned: hardware, libraries, compilers, and the kernels chosen."""

import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tightrope.backends.devices import toolchain
from tightrope.backends.devices.choice import describe_card, find_device
from tightrope.backends.devices.host import Host, look
from tightrope.backends.embedding.opening import footprints, open_embedders
from tightrope.backends.embedding.protocol import Embedder
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf import cards as gguf
from tightrope.backends.memory import GIB, free_memory
from tightrope.backends.settings import ModelSettings
from tightrope.backends.threads import compute_threads, physical_cores, usable_cpus
from tightrope.kernels import dispatch
from tightrope.kernels.trial.run import run_all

Line = tuple[str, str]  # What it is about, and what there is.

MIB = 1 << 20
COMPILERS = ("gcc", "g++", "clang", "nvcc", "cmake")


class Examination:
    """One look at the machine for the device that is asked for. `faults` grows with the lines: each in one line."""

    def __init__(self, settings: ModelSettings, host: Host | None = None) -> None:
        self.faults: list[str] = []
        self._host = look() if host is None else host
        self._settings = settings

    def lines(self) -> Iterator[Line]:
        """All lines, each as soon as it is known: what there is first, then each kernel."""
        yield from self._machine()
        yield from self._libraries()
        asked = self._settings.device
        device, fault = find_device(asked, self._host)
        if fault is not None and (asked != "auto" or self._host.has_card):
            self.faults.append(f"{device} can't be used: {fault}")
        if fault is not None:
            device = torch.device("cpu")
        what = describe_card(device, self._host) if device.type == "cuda" else str(device)
        yield "device", "; ".join([what, *self.faults])
        for one in dict.fromkeys((torch.device("cpu"), device)):
            yield from self._kernels(one)
        yield from self._embedders()

    def _machine(self) -> Iterator[Line]:
        cores, cpus = physical_cores(), len(usable_cpus())
        yield "machine", f"{platform.platform()}; {_cpu_name()}, {cores} cores, {cpus} CPUs; {_memory()}"
        host = self._host
        names = ", ".join(host.names) or ("of Windows, in WSL" if host.is_wsl else "there is one")
        yield "card", f"{names}; {len(host.nodes)} device files" if host.has_card else "none of NVIDIA's"
        if host.has_card:
            yield "driver", host.driver or ("of Windows" if host.is_wsl else "none is loaded")

    def _libraries(self) -> Iterator[Line]:
        header = toolchain.python_header()
        yield (
            "python",
            f"{platform.python_version()} in {sys.prefix}; {header} is {'' if header.exists() else 'not '}there",
        )
        cuda = torch.version.cuda
        yield "torch", f"{torch.__version__}, " + ("built without CUDA" if cuda is None else f"built for CUDA {cuda}")
        pinned = toolchain.triton_of_torch()
        asked = f"; torch asks for {pinned}" if pinned != "triton" else ""
        yield "triton", (toolchain.version("triton") or "not installed") + asked
        yield "llama.cpp", f"llama-cpp-python {toolchain.version('llama-cpp-python')}, {gguf.describe()}"
        yield "exllamav2", toolchain.version("exllamav2") or "not installed"
        for name in COMPILERS:
            yield name, toolchain.version_of(name) or "not there"

    def _kernels(self, device: torch.device) -> Iterator[Line]:
        """Which run on a device, and each of them run once beside the reference."""
        is_exllama = device.type == "cuda" and dispatch.has_exllama()
        fault = dispatch.fault(device)
        kernels = dispatch.describe(device, is_exllama=is_exllama)
        yield "kernels", f"{device}: {kernels}" if fault is None else f"{device}: {kernels}; {fault}"
        if fault is not None:
            self.faults.append(f"{device}: {fault}")
        for trial in run_all(device):
            if not trial.holds:
                self.faults.append(f"{device}: {trial.describe()}")
            state = "works" if trial.holds else "FAILS"
            yield state, f"{trial.describe()}; {trial.seconds * 1e3:.0f} ms at first"

    def _embedders(self) -> Iterator[Line]:
        """The models that embed or rank, where the settings name any, each run once."""
        threads, opened = compute_threads(self._settings.threads), list[Embedder]()
        try:
            taken = [one.weight_bytes + one.workspace_bytes for one in footprints(self._settings)]
            opened += open_embedders(self._settings)
            for embedder, num_bytes in zip(opened, taken, strict=True):
                card, began_s = embedder.card, time.perf_counter()
                is_ranking = card.kind == "reranking"
                rows = embedder.run([embedder.encode("fish", "sea" if is_ranking else None, "end")], threads)
                what = "ranks texts" if is_ranking else f"vectors of {card.dimensions} numbers"
                seconds = time.perf_counter() - began_s
                if not np.isfinite(rows).all():
                    raise BackendError(f"{card.model_id}: its numbers are none; the file may be damaged")
                yield (
                    "works",
                    f"{card.model_id}: {what}, texts of up to {card.max_tokens} tokens ({card.architecture}, "
                    f"{card.format}), {num_bytes / MIB:.0f} MiB; {seconds * 1e3:.0f} ms at first",
                )
        except BackendError as error:
            self.faults.append(str(error))
            yield "FAILS", str(error)
        finally:
            for embedder in opened:
                embedder.close()


def _memory() -> str:
    return f"{free_memory() / GIB:.1f} GiB of memory free"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
