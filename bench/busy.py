"""Decoding beside busy processes, with each fixed number of threads and with the chosen one: python -m bench.busy

Each busy process is a session of its own, as those of other people are: Linux shares a machine by sessions. An engine
decodes in this process. A case is timed for SECONDS once the choice has had SETTLING_S to see that something changed;
numbers of threads take turns, and the best of the rounds counts. On which CPU, and beside how many others, the system
lets a thread run is a matter of luck that lasts for seconds: where `chosen_threads` is the best fixed number, so is
what remains between the two.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from unittest.mock import patch

import numpy as np

from bench import report
from tightrope.backends import sharing
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.backends.sharing import Threads

BUSY, STREAMS = (0, 1, 2, 4, 8), (1, 8)
SECONDS, SETTLING_S = 1.2, 0.5
LEAST = 1 / 1.15  # of the best fixed number's speed
DEPTH, MAX_STEPS = 30, 200  # tokens of a prompt, and of an answer


def load_own(path: Path, threads: int) -> tuple[Backend, Threads]:
    from tightrope.backends.hf.backend import HFBackend

    settings = ModelSettings(model=str(path), max_model_len=1024, threads=threads, cache=CacheSettings(tokens=8192))
    backend = HFBackend(path, settings, lambda share: None)
    return backend, backend._part.own.threads


def load_llama(path: Path, threads: int) -> tuple[Backend, Threads]:
    from tightrope.backends.gguf.backend import GGUFBackend

    cache = CacheSettings(tokens=8192, dtype="f16")
    settings = ModelSettings(model=str(path), max_model_len=1024, threads=threads, cache=cache)
    backend = GGUFBackend(path, settings, lambda share: None)
    return backend, backend._context._threads


# What says how many threads compute, and how those wait that don't.
RULES = {"torch": [Path(sharing.__file__)]}
RULES["llama.cpp"] = [*RULES["torch"], Path(sharing.__file__).parent / "gguf" / "threadpool.py"]

ENGINES: dict[str, Callable[[Path, int], tuple[Backend, Threads]]] = {"torch": load_own, "llama.cpp": load_llama}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute meanwhile, each in a session of its own; none outlives this one."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(100_000): pass"
    command = [sys.executable, "-c", spin]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def fixed(threads: Threads, count: int | None) -> Iterator[None]:
    """Meanwhile steps have that many threads; as many as are chosen for None."""
    if count is None:
        threads._apply(threads.now)
        yield
        return
    threads._apply(count)
    with patch.object(Threads, "settle", lambda self: count):
        yield


def tokens_per_s(backend: Backend, streams: int) -> float:
    """Of all streams together."""
    for seq_id in range(streams):
        prompt = (np.arange(DEPTH) * 13 + seq_id * 77 + 500).tolist()
        backend.kv.open(seq_id, prompt, "", reuse="nothing")
        assert backend.kv.reserve(seq_id, DEPTH + MAX_STEPS)
        backend.forward([Chunk(seq_id, prompt, 0, "none")])
        backend.kv.commit(seq_id, 0, prompt)
    began_s = time.perf_counter()
    timed_s, timed = 0.0, 0
    for step in range(MAX_STEPS):
        stepped_s = time.perf_counter()
        backend.forward([Chunk(seq_id, [100 + step], DEPTH + step, "last") for seq_id in range(streams)])
        for seq_id in range(streams):
            backend.kv.commit(seq_id, DEPTH + step, [100 + step])
        if stepped_s - began_s >= SETTLING_S:
            timed_s, timed = timed_s + time.perf_counter() - stepped_s, timed + 1
            if timed_s >= SECONDS:
                break
    for seq_id in range(streams):
        backend.kv.close(seq_id, keep=False)
    return streams * timed / timed_s


Row = dict[str, object]


def measure(engine: str, path: Path, most: int, rounds: int, counts: Sequence[int]) -> Iterator[Row]:
    """A row for each number of busy processes and of streams."""
    backend, threads = ENGINES[engine](path, most)
    with closing(backend):
        for num_busy in counts:
            with busy(num_busy):
                for streams in STREAMS:
                    speeds: dict[int | None, float] = {}
                    for _ in range(rounds):
                        for count in (*range(1, most + 1), None):
                            with fixed(threads, count):
                                speeds[count] = max(speeds.get(count, 0.0), tokens_per_s(backend, streams))
                    best = max(speed for count, speed in speeds.items() if count is not None)
                    row: Row = {"engine": engine, "busy": num_busy, "streams": streams, "chosen_threads": threads.now}
                    row |= {f"{count}_threads_tokens_per_s": round(speeds[count], 1) for count in range(1, most + 1)}
                    row |= {"chosen_tokens_per_s": round(speeds[None], 1), "of_the_best": round(speeds[None] / best, 3)}
                    yield {**row, "met": speeds[None] >= LEAST * best}


def _known(name: str, setup: Row) -> list[Row]:
    """The rows of earlier runs with the same setup; numbers chosen by another rule tell nothing of this one."""
    known = report.known(name)
    return list(known["cases"]) if known and setup.items() <= known.items() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path, help="a folder for the torch engine, a GGUF file for llama.cpp")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="the most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--busy", type=int, action="append", help="measure beside so many alone; may be repeated")
    args = parser.parse_args()
    name = f"busy_{args.engine.replace('.', '')}"
    rule = blake2b(b"".join(path.read_bytes() for path in RULES[args.engine]), digest_size=8).hexdigest()
    setup: Row = {"model": args.model.name, "threads": args.threads, "seconds": SECONDS, "rule": rule}
    rows = {(row["busy"], row["streams"]): row for row in _known(name, setup)}
    for row in measure(args.engine, args.model, args.threads, args.rounds, args.busy or BUSY):
        rows[row["busy"], row["streams"]] = row
        print(row, flush=True)
        cases = sorted(rows.values(), key=lambda row: (row["busy"], row["streams"]))
        report.write(name, {**setup, "cases": cases})  # each, so that a run that is cut short loses one at most


if __name__ == "__main__":
    main()
