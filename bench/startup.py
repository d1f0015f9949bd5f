"""How soon a server answers after its start, and how much memory it takes: python -m bench.startup [MODEL.gguf]"""

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from bench import report
from bench.compare import bundled_model
from bench.load import exclusive
from bench.meter import process_tree
from bench.peers import PEERS, ROOT, Peer, Setup, StartFailed, end, end_servers_when_told, free_port
from bench.stats import spread

_TIMEOUT_S = 120.0
_POLL_S = 0.01


def start_once(peer: Peer, setup: Setup) -> dict[str, float]:
    """Start the server, wait until it is ready, and end it.

    Times in seconds from the start of the process; peak resident memory in MiB, of the process itself (`front_mib`) and
    of its children together (`engine_mib`). Raises StartFailed when it isn't ready in time.
    """
    port = free_port()
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *peer.arguments(setup, port)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found: dict[str, float] = {}
        while "ready_s" not in found:
            elapsed_s = time.perf_counter() - began_s
            status = _status(f"http://127.0.0.1:{port}{peer.ready_path}")
            if status is not None:
                found.setdefault("listening_s", elapsed_s)
            if status == 200:
                found["ready_s"] = elapsed_s
            elif elapsed_s > _TIMEOUT_S or process.poll() is not None:
                raise StartFailed(f"{peer.name} was not ready after {elapsed_s:.0f} s")
            else:
                time.sleep(_POLL_S)
        front, *children = process_tree(process.pid)
        return found | {
            "front_mib": _peak_mib(front),
            "engine_mib": sum(_peak_mib(child) for child in children),
        }
    finally:
        end(process)


def _status(url: str) -> int | None:
    """Status that the address answers with, None while nobody listens there."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _peak_mib(process: psutil.Process) -> float:
    """Most resident memory that the process has held so far, mapped model file included."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return peak_kib / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="path of a .gguf file; default: the bundled model")
    parser.add_argument("--server", action="append", choices=sorted(PEERS), help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    options = parser.parse_args()
    end_servers_when_told()
    setup = Setup(options.model or bundled_model())
    results: dict[str, object] = {}
    for name, peer in PEERS.items():
        if options.server and name not in options.server:
            continue
        try:
            with exclusive(options.lock):
                rounds = [start_once(peer, setup) for _ in range(options.rounds)]
        except StartFailed as error:
            raise SystemExit(str(error)) from None
        results[name] = {metric: spread([found[metric] for found in rounds]) for metric in rounds[0]}
        print(name, "  ".join(f"{metric} {spread([f[metric] for f in rounds])['median']:.2f}" for metric in rounds[0]))
    print(report.write("startup", results))


if __name__ == "__main__":
    main()
