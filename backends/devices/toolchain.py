"""What Triton needs of a machine at run time: it compiles a small C module for each kind of launch."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


def c_compiler() -> Path | None:
    """The C compiler that Triton finds by itself."""
    found = shutil.which("gcc") or shutil.which("clang")
    return None if found is None else Path(found)


def python_header() -> Path:
    """Where Python.h is, or should be."""
    scheme = sysconfig.get_default_scheme()
    # Debian's posix_local names a folder that holds no headers.
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)) / "Python.h"


def missing() -> str | None:
    """What there isn't of these two, and which package has it; None where both are there."""
    if c_compiler() is None:
        return "there is no C compiler: install gcc"
    if not python_header().exists():
        return f"there is no {python_header()}: install {_PYTHON}-dev (Debian, Ubuntu) or python3-devel (Fedora)"
    return None


def version_of(program: str) -> str | None:
    """The line that a program of this name says of itself; None where there is none, or it doesn't run."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[0] if lines else None


def triton_of_torch() -> str:
    """What to install for Triton: the version that this torch pins, where it pins one."""
    pins = (re.match(r"(triton\s*==\s*[\w.+]+)", line) for line in importlib.metadata.requires("torch") or ())
    return next((pin[1].replace(" ", "") for pin in pins if pin), "triton")


def version(package: str) -> str | None:
    """The installed version of a Python package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
