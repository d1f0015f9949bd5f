"""Starts the real command as a process of its own and reads from its output when it is ready."""

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

START_S = 300  # a busy two-core machine needs some ten seconds, and a minute for a cluster
STOP_S = 120  # Ray's processes end with a cluster


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. `output` is what it printed until it was ready."""

    url: str
    process: subprocess.Popen[str]
    output: str
    error_log: Path

    def errors(self) -> str:
        """What it has written to stderr by now."""
        return self.error_log.read_text("utf-8")


def clean_environment() -> dict[str, str]:
    """This environment without the settings that whoever runs the tests may have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TIGHTROPE_")}


MODULE = (sys.executable, "-m", "tightrope")


@contextmanager
def run_server(
    *options: str,
    status: int | None = 0,
    program: Sequence[str] = MODULE,
    cwd: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[RunningServer]:
    """Serve on a free port while the context lasts; then end it by SIGTERM and check the status that it leaves with.

    status: None where the context ends it. environment: more variables.
    """
    command = [*program, "serve", "--port", "0", *options]
    with started(command, clean_environment() | environment, status=status, cwd=cwd) as server:
        yield server


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], *, status: int | None = 0, cwd: Path | None = None
) -> Iterator[RunningServer]:
    """What a command serves, in no environment but this one, while the context lasts; see run_server."""
    with tempfile.NamedTemporaryFile() as errors:
        error_log = Path(errors.name)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            cwd=cwd,
        )
        try:
            output = _read_until_ready(process)
            if "\ntry " not in output:
                raise AssertionError(f"the server did not start: {output}{error_log.read_text('utf-8')}")
            url = re.findall(r"http://[\d.:]+", output)[0]
            yield RunningServer(url, process, output, error_log)
            process.terminate()
            ended = process.wait(STOP_S)
            assert status is None or ended == status
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def engine_pid(front: int, module: str = "tightrope.engine.process.child") -> int:
    """The front's child that runs the engine, or another module."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            command = status.with_name("cmdline").read_bytes()
        except (OSError, StopIteration):
            continue  # it ended meanwhile
        if int(parent.split()[1]) == front and module.encode() in command:
            return int(status.parent.name)
    raise AssertionError("the engine process isn't there")


def _read_until_ready(process: subprocess.Popen[str]) -> str:
    """Everything printed up to the last line of the announcement, or up to its end if it ends before."""
    assert process.stdout is not None
    deadline = threading.Timer(START_S, process.kill)  # which ends the output, too
    deadline.start()
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("try "):
                break
        return "".join(lines)
    finally:
        deadline.cancel()
