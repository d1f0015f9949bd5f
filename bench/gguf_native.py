"""llama.cpp as it is built for this machine, beside what bench.gguf_engines has: python -m bench.gguf_native

Its library alone, without a server, with the same files, threads, cache and numbers of tokens; drawing and text, which
a server has beside, are left out. Adds to bench/results/gguf_engines.json how many times as fast our server was.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as ll

from bench import report
from bench.gguf_engines import CASES, NAME, OURS, Case
from bench.workloads import DECODE_TOKENS
from tightrope.backends.gguf.native import ContextOptions, ModelOptions, NativeContext, NativeModel

STREAMS, CONTEXT, BATCH = 8, 4096, 512
BARS = {"q4_1": (1.2, 1.8, 1.5), "q8_0": (1.2, 1.8, 1.5), "7b": (1.0, None, 1.1)}  # One stream, eight, a prompt.
PLACES = (("1 stream", "decode_tokens_per_s"), ("8 streams", "tokens_per_s"), ("prompt", "prompt_tokens_per_s"))


def opened(path: Path, threads: int) -> NativeContext:
    options = ContextOptions(
        num_cells=CONTEXT, max_seqs=STREAMS, batch_tokens=BATCH, ubatch_tokens=BATCH, max_outputs=STREAMS,
        threads=threads, type_k=ll.GGML_TYPE_F16, type_v=ll.GGML_TYPE_F16, flash_attention=True,
    )  # fmt: skip
    return NativeContext(NativeModel(path, ModelOptions()), options)


def decoded(context: NativeContext, slots: list[int], positions: list[int]) -> None:
    """One token more for each of these sequences."""
    count = len(slots)
    context.token_ids[:count] = 2000 + np.arange(count)
    context.positions[:count], context.slots[:count], context.outputs[:count] = positions, slots, 1
    context.decode(0, count)
    context.logits(count)


def read(context: NativeContext, slots: list[int], tokens: int) -> None:
    """Prompts of so many tokens each, one after another, in whole batches."""
    token_ids = np.random.default_rng(1).integers(1000, 40000, tokens * len(slots))
    rows = np.arange(len(token_ids))
    for begin, end in pairwise([*range(0, len(rows), BATCH), len(rows)]):
        size, some = end - begin, rows[begin:end]
        context.token_ids[:size], context.positions[:size] = token_ids[some], some % tokens
        context.slots[:size], context.outputs[:size] = np.array(slots)[some // tokens], some % tokens == tokens - 1
        context.decode(0, size)
    context.logits(1)


def speeds(path: Path, case: Case, summary: dict[str, Any], threads: int, rounds: int) -> dict[str, float]:
    """Tokens a second by scenario, the median of so many rounds; as many tokens as our server had."""
    context = opened(path, threads)
    found: dict[str, list[float]] = {scenario.name: [] for scenario in case.scenarios}
    for _ in range(rounds):
        for name in found:
            mine = summary[name][OURS]
            for slot in range(STREAMS):
                context.remove_cells(slot, 0)
            slots = list(range(STREAMS if name == "8 streams" else 1))
            tokens = round(mine["prompt_tokens"]["median"] / len(slots))
            steps = 24 if case.name == "7b" else DECODE_TOKENS
            began = time.perf_counter()
            read(context, slots, tokens)
            first = time.perf_counter()
            if name == "prompt":
                found[name].append(tokens / (first - began))
                continue
            for step in range(1, steps):
                decoded(context, slots, [tokens - 1 + step] * len(slots))
            ended = time.perf_counter()
            speed = (steps - 1) / (ended - first) if len(slots) == 1 else steps * len(slots) / (ended - began)
            found[name].append(speed)
    context.close()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made and kept; default: one that is deleted")
    options = parser.parse_args()
    results: dict[str, Any] = dict(json.loads((report.RESULTS / f"{NAME}.json").read_text())["results"])
    with TemporaryDirectory() as temporary:
        for name in options.model:
            case, file = CASES[name], (options.folder or Path(temporary)) / CASES[name].file
            path = file if file.is_file() else case.make(file)
            found = speeds(path, case, results[name]["summary"], options.threads, options.rounds)
            results[name]["native"] = verdicts(results[name]["summary"], found, BARS[name])
            print(name, results[name]["native"], flush=True)
            report.write(NAME, results)


def verdicts(
    summary: dict[str, Any], found: dict[str, float], bars: tuple[float | None, float | None, float | None]
) -> list[dict[str, Any]]:
    """For each scenario both speeds, their ratio, and whether a bar is met. Any: ready for JSON."""
    rows: list[dict[str, Any]] = []
    for (scenario, metric), bar in zip(PLACES, bars, strict=True):
        if scenario in found:
            ours = summary[scenario][OURS][metric]["median"]
            value = ours / found[scenario]
            row = {"scenario": scenario, "ours": round(ours, 2), "library": round(found[scenario], 2)}
            rows.append({**row, "value": value, **({} if bar is None else {"bar": bar, "met": value >= bar})})
    return rows


if __name__ == "__main__":
    main()
