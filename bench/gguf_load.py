"""What the look at all values of a GGUF file adds to its load: python -m bench.gguf_load [MODEL.gguf] [--rounds N]

The two loads of a round run one after the other, the first of them by turns, and their ratio is taken, as machines get
slower and faster over minutes. "cold" loads come after the file's pages have been dropped from memory.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from unittest.mock import patch

from bench import report
from tightrope.backends.gguf import backend as module
from tightrope.backends.gguf.values import ValueScan
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import CacheSettings, ModelSettings


class NoScan(ValueScan):
    """Takes every value for finite."""

    def _run(self) -> None:
        pass


def load_s(path: Path, scan: type[ValueScan], *, is_cold: bool) -> float:
    """Seconds of one load, tokenizer and a small cache included."""
    if is_cold:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    settings = ModelSettings(model=str(path), max_model_len=512, cache=CacheSettings(tokens=512))
    began_s = time.perf_counter()
    with patch.object(module, "ValueScan", scan):
        backend = module.GGUFBackend(path, settings, lambda _: None)
    elapsed_s = time.perf_counter() - began_s
    backend.close()
    return elapsed_s


def measure(path: Path, rounds: int, *, is_cold: bool) -> dict[str, float]:
    """Medians over the rounds, and the median of each round's ratio."""
    plain: list[float] = []
    looked: list[float] = []
    for number in range(rounds):
        turns = [(NoScan, plain), (ValueScan, looked)]
        for scan, times in turns[:: -1 if number % 2 else 1]:
            times.append(load_s(path, scan, is_cold=is_cold))
    ratio = statistics.median(b / a for a, b in zip(plain, looked, strict=True))
    return {
        "plain_s": round(statistics.median(plain), 4),
        "looked_at_s": round(statistics.median(looked), 4),
        "ratio": round(ratio, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    path = arguments.model or bundled_model()
    results: dict[str, object] = {"model": path.name}
    for name, is_cold in (("warm", False), ("cold", True)):
        results[name] = measure(path, arguments.rounds, is_cold=is_cold)
        print(name, results[name], flush=True)
    report.write("gguf_load", results)


if __name__ == "__main__":
    main()
