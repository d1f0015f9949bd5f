"""Install the build of torch that a machine needs here: `python torch_build.py cpu|cuda CONSTRAINTS [must]`.

On Linux the package index's torch is the build for CUDA, which brings NVIDIA's libraries: 2.7 GB to download. Torch's
own index has one for CPUs, of 190 MB: it is taken where that index answers within seconds, and else whatever pip finds,
which runs on a CPU as well. Lines that begin with "torch: " are for the person who waits.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
import threading
import urllib.request
from pathlib import Path
from shutil import which

INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
ANSWER_S = 5.0  # This long the index has for its list of torch's builds, the search for its name included.


def main(device: str, constraints: str, must: str = "") -> int:
    """Returns the status to exit with: not 0 where no build is to be had, or, if it must be, none for a card."""
    version, cuda = installed()
    if version and (cuda is None) != (device == "cpu"):
        pip("uninstall", "--yes", "torch")  # Else it counts as installed: pip looks at the version alone.
    if device == "cuda":
        return for_a_card(constraints, is_a_must=must != "")
    if not installed()[0]:
        if not answers(f"{INDEX}/torch/"):
            print(f"torch: {INDEX} doesn't answer; taking what pip finds, which may be the build for CUDA, 2.7 GB")
        elif pip("install", "--no-deps", "--index-url", INDEX, "-c", constraints, "torch"):
            print(f"torch: {INDEX} has no build for this machine; taking what pip finds, which may be 2.7 GB")
    return pip("install", "-c", constraints, "torch") or said()


def for_a_card(constraints: str, *, is_a_must: bool) -> int:
    """Install the build for CUDA, and say what else a card needs here."""
    if status := pip("install", "-c", constraints, "torch"):
        return status
    if installed()[1] is None:
        print(
            f"torch: what pip finds, {installed()[0]}, is for CPUs; name an index with a build for CUDA: "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu130 make serve DEVICE=cuda"
        )
        return 1 if is_a_must else 0
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        print("torch: Triton needs Python's headers to start kernels: install python3-dev")
    if not (which("gcc") or which("clang") or os.environ.get("CC")):
        print("torch: Triton needs a C compiler to start kernels: install gcc")
    return said()


def installed() -> tuple[str, str | None]:
    """Version and toolkit of the torch that is installed here; an empty version where none is, None for a CPU's."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    found = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return str(found["__version__"]), found["cuda"]


def said() -> int:
    version, cuda = installed()
    print(f"torch: {version}, {'for CPUs' if cuda is None else f'for CUDA {cuda}'}")
    return 0


def answers(url: str) -> bool:
    """Whether a page can be had in time. A name is looked up for as long as the system likes, so a thread does it."""
    found: list[int] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_S) as reply:
                found.append(reply.status)
        except OSError:
            return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return bool(found)


def pip(*arguments: str) -> int:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
