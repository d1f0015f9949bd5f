"""Two ways to run an engine: in a process of its own, or in a thread of this one (tests, debugging)."""

import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tightrope.backends.memory import num_ended_for_memory, tree_memory
from tightrope.processes import child_command, child_environment

if TYPE_CHECKING:
    from tightrope.engine.process.child import OpenBackend


class EngineHandle(Protocol):
    """A started engine."""

    def kill(self, why: str) -> None:
        """End it at once, if it still runs; `why` goes into the words on how it has ended."""

    def poll(self) -> str | None:
        """How it has ended, in words; None while it runs."""

    def private_bytes(self) -> int:
        """Memory that it has to itself, and that is free when it has ended."""


Launcher = Callable[[socket.socket], EngineHandle]


class ProcessHandle:
    """An engine in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._killed_as: str | None = None  # Why this server has killed it.
        self._num_ended_before = num_ended_for_memory()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self, why: str) -> None:
        if self._process.poll() is None:
            self._killed_as = why
            self._process.kill()

    def private_bytes(self) -> int:
        return tree_memory(self.pid)

    def poll(self) -> str | None:
        status = self._process.poll()
        if status is None:
            return None
        if status == -signal.SIGKILL:
            return f"killed by SIGKILL, {self._killer()}"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    def _killer(self) -> str:
        """Who has killed it, as far as that can be known: a process gets no word of SIGKILL, and leaves none."""
        if self._killed_as is not None:
            return f"by this server: {self._killed_as}"
        if num_ended_for_memory() > self._num_ended_before:
            return "as the machine's memory ran out"
        return "from outside"


def spawn_process(sock: socket.socket) -> ProcessHandle:
    """Start the engine process on its end of the socket pair; the caller closes its copy of `sock`."""
    return run_process(child_command("tightrope.engine.process.child", str(sock.fileno())), sock)


def run_process(command: list[str], sock: socket.socket) -> ProcessHandle:
    """Run a command that is told the descriptor of `sock`, which it inherits."""
    return ProcessHandle(
        subprocess.Popen(command, pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL, env=child_environment())
    )


class ThreadHandle:
    """An engine in a thread; it ends when the front closes the socket."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def kill(self, why: str) -> None:
        """Nothing: the closed socket ends it."""

    def private_bytes(self) -> int:
        return 0

    def poll(self) -> str | None:
        return None if self._thread.is_alive() else "thread ended"


def thread_launcher(open_backend: "OpenBackend") -> Launcher:
    """Starts engines in threads of this process, with the model that `open_backend` gives."""

    def launch(sock: socket.socket) -> ThreadHandle:
        # The import is here to keep torch out of a front that never asks for this.
        from tightrope.engine.process.child import serve

        options = {"open_backend": open_backend}
        thread = threading.Thread(target=serve, args=(sock.dup(),), kwargs=options, name="engine", daemon=True)
        thread.start()
        return ThreadHandle(thread)

    return launch
