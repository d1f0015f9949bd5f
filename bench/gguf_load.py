"""What the look at all values of a GGUF file adds to its load: python -m bench.gguf_load [MODEL.gguf] [--rounds N]

With --make q4_k f16 files of a gigabyte of these types are written to a temporary folder and measured instead.

The two loads of a round run one after the other, the first of them by turns, and their ratio is taken, as machines get
slower and faster over minutes. "cold" loads come after the file's pages have been dropped from memory. Beside the time
stands what the loading thread computed, and all threads together: steadier where others use the machine, too.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

from bench import report
from bench.large_gguf import TYPES, write_large
from tightrope.backends.gguf import backend as module
from tightrope.backends.gguf.values import ValueScan
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import CacheSettings, ModelSettings

LARGE_BYTES = 10**9


class NoScan(ValueScan):
    """Takes every value for finite."""

    def _run(self) -> None:
        pass


class Load(NamedTuple):
    """Seconds."""

    elapsed: float
    loader_cpu: float  # of the thread that loads
    cpu: float  # of all threads


def load(path: Path, scan: type[ValueScan], *, is_cold: bool) -> Load:
    """One load, tokenizer and a small cache included."""
    if is_cold:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    settings = ModelSettings(model=str(path), max_model_len=512, cache=CacheSettings(tokens=512))
    began = (time.perf_counter(), time.thread_time(), time.process_time())
    with patch.object(module, "ValueScan", scan):
        backend = module.GGUFBackend(path, settings, lambda _: None)
    ended = (time.perf_counter(), time.thread_time(), time.process_time())
    backend.close()
    return Load(*(end - begin for begin, end in zip(began, ended, strict=True)))


def measure(path: Path, rounds: int, *, is_cold: bool) -> dict[str, float]:
    """Medians over the rounds, and the medians of each round's ratios."""
    plain: list[Load] = []
    looked: list[Load] = []
    load(path, NoScan, is_cold=is_cold)
    for number in range(rounds):
        turns = [(NoScan, plain), (ValueScan, looked)]
        for scan, loads in turns[:: -1 if number % 2 else 1]:
            loads.append(load(path, scan, is_cold=is_cold))
    results: dict[str, float] = {}
    for field, name in (("elapsed", ""), ("loader_cpu", "loader_cpu_"), ("cpu", "cpu_")):
        before, after = ([getattr(one, field) for one in loads] for loads in (plain, looked))
        results[f"{name}plain_s"] = round(statistics.median(before), 4)
        results[f"{name}looked_at_s"] = round(statistics.median(after), 4)
        results[f"{name}ratio"] = round(statistics.median(b / a for a, b in zip(before, after, strict=True)), 4)
    return results


def measure_both(path: Path, rounds: int) -> dict[str, object]:
    results: dict[str, object] = {"model": path.name, "bytes": path.stat().st_size}
    for name, is_cold in (("warm", False), ("cold", True)):
        results[name] = measure(path, rounds, is_cold=is_cold)
        print(path.name, name, results[name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--make", nargs="+", default=(), choices=sorted(TYPES), metavar="TYPE")
    arguments = parser.parse_args()
    measured = []
    if not arguments.make:
        measured.append(measure_both(arguments.model or bundled_model(), arguments.rounds))
    for type_name in arguments.make:
        with TemporaryDirectory() as folder:
            path = write_large(Path(folder) / f"{type_name}.gguf", type_name, LARGE_BYTES)
            os.sync()  # pages that aren't on the disk yet can't be dropped
            measured.append(measure_both(path, arguments.rounds))
    report.write("gguf_load_large" if arguments.make else "gguf_load", {"models": measured})


if __name__ == "__main__":
    main()
