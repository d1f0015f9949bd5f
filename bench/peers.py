"""The servers that are compared, and how each is started: same file, threads, context, cache type and slots."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import psutil

from bench.meter import process_tree
from bench.workloads import Target

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
_GGML_TYPES = {"f16": "1", "q8": "8"}


@dataclass(frozen=True, slots=True)
class Setup:
    """What all servers of a comparison have in common; `context` is the whole cache in tokens."""

    model: Path
    threads: int = 2
    context: int = 8192
    slots: int = 8
    cache: Literal["f16", "q8"] = "f16"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server: its arguments to Python, where it says that it is ready, and what only it needs in a request."""

    name: str
    arguments: Callable[[Setup, int], list[str]]
    ready_path: str = "/health"
    extra_body: dict[str, object] = field(default_factory=dict)
    is_parallel: bool = True  # runs several requests at the same time
    target: type[Target] = Target  # how it is asked
    only: frozenset[str] | None = None  # the scenarios it takes part in; None is all
    checkout: Path = ROOT  # whose environment it runs in


def _tightrope(setup: Setup, port: int) -> list[str]:
    return [
        *("-m", "tightrope", "serve", str(setup.model), "--port", str(port), "--threads", str(setup.threads)),
        *("--max-model-len", str(setup.context), "--kv-cache-tokens", str(setup.context)),
        *("--kv-cache", setup.cache, "--max-num-seqs", str(setup.slots)),
    ]


def _through_llama(setup: Setup, port: int) -> list[str]:
    return [*_tightrope(setup, port), "--gguf-engine", "llama.cpp"]


def _llama_server(setup: Setup, port: int) -> list[str]:
    return [
        *("-m", "bench.xllamacpp_server", str(setup.model), "--port", str(port), "--threads", str(setup.threads)),
        *("--context", str(setup.context), "--cache", setup.cache, "--slots", str(setup.slots)),
    ]


def _llama_cpp_python(setup: Setup, port: int) -> list[str]:
    return [
        *("-m", "llama_cpp.server", "--model", str(setup.model), "--port", str(port), "--host", "127.0.0.1"),
        *("--n_threads", str(setup.threads), "--n_threads_batch", str(setup.threads), "--n_ctx", str(setup.context)),
        *("--type_k", _GGML_TYPES[setup.cache], "--type_v", _GGML_TYPES[setup.cache], "--flash_attn", "true"),
        *("--interrupt_requests", "false", "--verbose", "false"),  # by default a new request ends the running one
    ]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("tightrope", _tightrope),
        Peer("tightrope through llama.cpp", _through_llama),
        Peer("llama.cpp server", _llama_server),
        Peer(
            "llama-cpp-python server",
            _llama_cpp_python,
            ready_path="/v1/models",
            extra_body={"repeat_penalty": 1.0},  # else it penalises repetition, which the others don't
            is_parallel=False,
        ),
    )
}


class StartFailed(Exception):
    """A server ended, or wasn't ready in time; the message ends with the last lines it printed."""


@contextmanager
def running(peer: Peer, setup: Setup, timeout_s: float = START_S) -> Iterator[Target]:
    """Start the server, wait until it is ready, and end it with all its children after the block.

    Raises StartFailed.
    """
    port = free_port()
    environment = {"OMP_NUM_THREADS": str(setup.threads)}  # for those without an option
    python = sys.executable if peer.checkout == ROOT else str(peer.checkout / ".venv/bin/python")
    with tempfile.TemporaryFile("w+") as log:
        url = f"http://127.0.0.1:{port}"
        command = [python, *peer.arguments(setup, port)]
        with started(command, url + peer.ready_path, log, environment, timeout_s, peer.checkout) as process:
            yield peer.target(peer.name, url, process.pid, peer.extra_body)


@contextmanager
def started(
    command: Sequence[str],
    ready_url: str,
    log: IO[str],
    environment: Mapping[str, str],
    timeout_s: float = START_S,
    folder: Path = ROOT,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until `ready_url` answers, and end it with all its children after the block.

    log: takes what it prints. environment: what differs from ours. folder: where it runs. Raises StartFailed.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    try:
        if not _wait_ready(ready_url, process, timeout_s):
            log.seek(0)
            name = " ".join(command[1:4])
            raise StartFailed(f"{name} did not start: {' | '.join(log.read().splitlines()[-5:])}")
        yield process
    finally:
        end(process)


def finding_ours() -> dict[str, str]:
    """The modules' search path with this checkout in front, for a server whose package isn't installed.

    `python -m` looks in the current folder, and the server's other processes don't.
    """
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *([others] if others else [])])}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def is_ready(url: str) -> bool:
    """Whether the address answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def end_servers_when_told() -> None:
    """Let SIGTERM unwind this process as Ctrl-C does, so that the servers it started end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, then see to it that it and its children do."""
    tree = process_tree(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=10)
    for survivor in alive:
        survivor.kill()
    process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and process.poll() is None:
        if is_ready(url):
            return True
        time.sleep(0.1)
    return False
