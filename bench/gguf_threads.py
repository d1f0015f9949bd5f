"""How llama.cpp's threads should wait: decode steps by thread pool and wait policy, alone and beside a busy process.

    python -m bench.gguf_threads [--openmp FOLDER]

Each setting runs in a process of its own, because OpenMP reads its environment once. Between two steps the main thread
computes for 0.3 ms, as the sampler does. The neighbour is one process that spins. FOLDER holds a libllama.so that was
built with OpenMP; without it only ggml's own pool is measured. Times are medians of the better of two runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from bench import report
from tightrope.backends.protocol import Backend, Chunk

BETWEEN_S = 0.0003
STREAMS = (1, 8)
STEPS = {1: 60, 8: 20}

POOL = {f"own pool, poll {poll}": {"TIGHTROPE_BENCH_POLL": str(poll)} for poll in (0, 1, 50)}
OPENMP = {
    "OpenMP, default": {},
    "OpenMP, GOMP_SPINCOUNT=500": {"GOMP_SPINCOUNT": "500"},
    "OpenMP, GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "OpenMP, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def decode_ms() -> dict[str, float]:
    """Median milliseconds of a decode step, the work between steps included; run in a process of its own."""
    from tightrope.backends.gguf import threadpool
    from tightrope.backends.gguf.backend import GGUFBackend
    from tightrope.backends.locate import bundled_model
    from tightrope.backends.settings import CacheSettings, ModelSettings

    threadpool.POLL = int(os.environ.get("TIGHTROPE_BENCH_POLL", threadpool.POLL))
    settings = ModelSettings(max_model_len=1024, cache=CacheSettings(tokens=4096, dtype="f16"))
    backend = GGUFBackend(bundled_model(), settings, lambda _: None)
    medians = {f"{n}_streams_ms": min(_median_ms(backend, n) for _ in range(2)) for n in STREAMS}
    backend.close()
    return medians


def _median_ms(backend: Backend, streams: int) -> float:
    depth = 30
    for seq_id in range(streams):
        prompt = (np.arange(depth) * 13 + seq_id * 77 + 500).tolist()
        backend.kv.open(seq_id, prompt, "", reuse="nothing")
        assert backend.kv.reserve(seq_id, depth + STEPS[streams])
        backend.forward([Chunk(seq_id, prompt, 0, "none")])
        backend.kv.commit(seq_id, 0, prompt)
    times = []
    for step in range(STEPS[streams]):
        began = time.perf_counter()
        while time.perf_counter() - began < BETWEEN_S:
            pass
        backend.forward([Chunk(seq_id, [100 + step], depth + step, "last") for seq_id in range(streams)])
        for seq_id in range(streams):
            backend.kv.commit(seq_id, depth + step, [100 + step])
        times.append(time.perf_counter() - began)
    for seq_id in range(streams):
        backend.kv.close(seq_id, keep=False)
    return round(statistics.median(times) * 1000, 2)


def measure(openmp: str | None) -> list[dict[str, object]]:
    """Every setting on a quiet machine, then every setting beside a busy neighbour."""
    settings = dict(POOL)
    if openmp:
        settings |= {name: {**extra, "LLAMA_CPP_LIB_PATH": openmp} for name, extra in OPENMP.items()}
    rows: list[dict[str, object]] = []
    for neighbours in (0, 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
        try:
            for name, extra in settings.items():
                rows.append({"setting": name, "busy_neighbours": neighbours, **_in_process(extra)})
                print(rows[-1], flush=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    return rows


def _in_process(extra: dict[str, str]) -> dict[str, float]:
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-m", "bench.gguf_threads", "--worker"]
    done = subprocess.run(command, env={**bare, **extra}, capture_output=True, text=True, check=True)
    medians: dict[str, float] = json.loads(done.stdout)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openmp", metavar="FOLDER", help="where a libllama.so with OpenMP lies")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(decode_ms()))
        return
    rows = measure(args.openmp)
    print(report.write("gguf_threads", {"between_steps_ms": BETWEEN_S * 1000, "settings": rows}))


if __name__ == "__main__":
    main()
