"""The `tightrope` command with engines that are forked from a process in which all is imported.

    python -m bench.forked_engines serve MODEL ...

Most of what an engine's start takes are imports of torch and transformers, for which a run of hundreds of kills need
not wait. The rest is as ever: each engine is a process with a memory of its own, which loads the model and is killed.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

from bench.watch import FORKED
from tightrope.backends.memory import tree_memory
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import EngineHandle
from tightrope.processes import child_command, child_environment

NAME = "bench.forked_engines"


class ForkedHandle:
    """An engine that another process has forked, and waits for."""

    def __init__(self, pid: int) -> None:
        self._pid, self._file = pid, os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._file)

    def kill(self, why: str) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._file, signal.SIGKILL)

    def poll(self) -> str | None:
        return "it has ended" if select.select([self._file], [], [], 0)[0] else None

    def private_bytes(self) -> int:
        return tree_memory(self._pid)


def launch(forks: socket.socket, sock: socket.socket) -> EngineHandle:
    """Have an engine forked on its end of a socket pair."""
    socket.send_fds(forks, [b"engine"], [sock.fileno()])
    return ForkedHandle(int.from_bytes(forks.recv(8), "big"))


def fork_engines(forks: socket.socket) -> None:
    """Import all, and then fork an engine for each socket that comes."""
    import tightrope.backends.gguf.backend
    import tightrope.backends.own_gguf.backend  # noqa: F401  # All of them, as is said above.
    from tightrope.engine.process import child

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The system waits for those that have ended.
    while True:
        message, files, _, _ = socket.recv_fds(forks, 16, 1)
        if not message:
            return
        pid = os.fork()
        if not pid:
            forks.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            Path("/proc/self/comm").write_text(FORKED)
            sys.argv[1:] = [str(files[0])]
            child.main()
        os.close(files[0])
        forks.send(pid.to_bytes(8, "big"))


def main() -> int:
    """The command, or the process that forks, where a number says which descriptor it is asked by."""
    if sys.argv[1].isdecimal():
        fork_engines(socket.socket(fileno=int(sys.argv[1])))
        return 0
    from tightrope.server.cli import serve
    from tightrope.server.cli.commands import run

    ours, theirs = socket.socketpair()
    command = child_command(NAME, str(theirs.fileno()))
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=child_environment())
    theirs.close()
    try:
        with patch.object(serve, "EngineClient", partial(EngineClient, launch=partial(launch, ours))):
            return run(sys.argv[1:])
    finally:
        ours.close()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
