"""What is told of an engine's process that has ended."""

import os
import signal
import subprocess
import sys

import pytest

from tightrope.engine.process import launch
from tightrope.engine.process.launch import ProcessHandle

WAITS = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def waiting() -> tuple[ProcessHandle, subprocess.Popen[bytes]]:
    process = subprocess.Popen(WAITS, stdin=subprocess.PIPE)
    return ProcessHandle(process), process


def end_of(handle: ProcessHandle, process: subprocess.Popen[bytes]) -> str | None:
    assert process.stdin is not None
    process.wait()
    process.stdin.close()
    return handle.poll()


def test_a_process_tells_how_it_has_ended() -> None:
    handle, process = waiting()
    assert handle.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    assert end_of(handle, process) == "exit status 0"
    handle, process = waiting()
    os.kill(handle.pid, signal.SIGTERM)
    assert end_of(handle, process) == "killed by SIGTERM"


def test_it_is_told_who_has_killed_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, process = waiting()
    handle.kill("it said nothing")
    assert end_of(handle, process) == "killed by SIGKILL, by this server: it said nothing"
    handle, process = waiting()
    os.kill(handle.pid, signal.SIGKILL)
    assert end_of(handle, process) == "killed by SIGKILL, from outside"
    handle, process = waiting()
    so_far = launch.num_ended_for_memory()
    monkeypatch.setattr(launch, "num_ended_for_memory", lambda: so_far + 1)
    os.kill(handle.pid, signal.SIGKILL)
    assert end_of(handle, process) == "killed by SIGKILL, as the machine's memory ran out"
