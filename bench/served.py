"""A server of ours that is left to crowds of clients: how it is started, stopped, and what it leaves behind."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import psutil

from bench.compare import bundled_model
from bench.meter import process_tree
from bench.peers import ROOT, finding_ours, free_port, started
from bench.small_models import write_model

START_S = 600.0  # for a server to be ready, on a machine that does other things, too
STOP_S = 90.0  # the server lets answers finish for a minute
LEFT_S = 10.0  # what is still there so long after the server is left behind


@dataclass(frozen=True, slots=True)
class Served:
    """A server under test."""

    url: str
    process: Popen[bytes]
    log: Path
    temp: Path  # where it puts its temporary files


@dataclass(frozen=True, slots=True)
class Stopped:
    """What stayed behind when the server was told to end; `status` is None if it did not."""

    status: int | None
    processes: Sequence[str]  # the commands of those that still run
    files: Sequence[str]


@contextmanager
def serving(
    model: Path, folder: Path, name: str, options: Sequence[str], *, are_forked: bool = False
) -> Iterator[Served]:
    """Serve a model, with temporary files in `folder` and the log as build/`name`.log. Raises StartFailed.

    are_forked: engines start without their imports; see bench/forked_engines.py.
    """
    temp, log = folder / "temp", ROOT / "build" / f"{name}.log"
    temp.mkdir()
    log.parent.mkdir(exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    module = "bench.forked_engines" if are_forked else "tightrope"
    command = [sys.executable, "-m", module, "serve", str(model), "--port", str(port), *options]
    environment = {"TMPDIR": str(temp), **finding_ours()}
    with log.open("w+") as output, started(command, f"{url}/health", output, environment, START_S) as process:
        yield Served(url, process, log, temp)


def stop(served: Served) -> Stopped:
    """Tell the server to end, and see what is left of it."""
    tree = process_tree(served.process.pid)
    commands = {process.pid: _command(process) for process in tree}
    served.process.terminate()
    try:
        status: int | None = served.process.wait(STOP_S)
    except TimeoutExpired:
        status = None
    _, alive = psutil.wait_procs(tree, timeout=LEFT_S)
    left = [path for path in served.temp.rglob("*") if not path.is_dir()]
    return Stopped(status, [commands[process.pid] for process in alive], [path.name for path in left])


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[1:4])
    except psutil.Error:
        return f"process {process.pid}"


def last_lines_of_tracebacks(log: str) -> list[str]:
    """What each traceback in a log says at its end, without the places in files."""
    found = re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(.*)$", log, re.MULTILINE)
    return [line[:200] for line in found]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="path of a .gguf file or model folder; default: the bundled model")
    which.add_argument("--tiny", action="store_true", help="a tiny model that is written on the fly, for quick trials")


def chosen_model(options: argparse.Namespace, folder: Path) -> Path:
    """The model that was asked for; a tiny one is written into `folder`."""
    if options.tiny:
        return write_model(folder / "tiny")
    model: Path | None = options.model
    return bundled_model() if model is None else model.resolve()
