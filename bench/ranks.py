"""Decode steps of a model in two ranks of one thread, beside those of one rank of two threads, on this CPU.

    python -m bench.ranks [--rounds N] [--layers N] [--models NAME ...]

Models: SmolLM2, as its GGUF file and as a folder in bf16, and a few layers of Yi-34B's shape in EXL2 of 4.65 bits and
GPTQ of 4, whose codes are all zero: they take as long whatever they are. Each setting runs in processes of its own,
the two by turns; a time is the median of a run's steps, and a ratio that of the medians over all rounds. Also told are
the most memory that each rank has held, and what a gather takes by itself. Writes bench/results/ranks.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # JSON

import torch

from bench import report
from bench.gpu.random_weights import YI_34B, exl2_entries, gptq_entries, write_sparse
from bench.small_models import write_tokenizer
from bench.watch import line, verdict

PROMPT, STEPS = 64, 64  # Tokens, and decode steps behind them.
WAYS = {"one rank of two threads": (1, 2), "two ranks of one thread": (2, 2)}  # Ranks, and threads together.
SMOLLM2, LARGE = 2.0, 1.11  # bars: of a step of one rank, so that two have half of its speed, or nine tenths
SMALL_VOCABULARY = 320  # What is measured of the large ones are their layers.
GATHERS, WIDTH = 5000, 576
SUPPORT = Path(__file__).parents[1] / "tests" / "support"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: the median of its steps, and the most that each rank has held, in MiB."""

    step_ms: float
    peak_mib: Sequence[float]


def run(path: Path, ranks: int, threads: int, steps: int) -> Measured:
    """Decode a sequence; in a process of its own, as it may load but one model at its best."""
    from tightrope.backends.detect import open_backend
    from tightrope.backends.hf.backend import HFBackend
    from tightrope.backends.hf.ranks.memory import peak_bytes
    from tightrope.backends.hf.ranks.runner import RankedRunner
    from tightrope.backends.protocol import Chunk
    from tightrope.backends.settings import CacheSettings, ModelSettings

    settings = ModelSettings(
        model=str(path), device="cpu", threads=threads, tensor_parallel=ranks, max_model_len=512, max_num_seqs=1,
        gguf_engine="own", cache=CacheSettings(tokens=1024),
    )  # fmt: skip
    with closing(open_backend(settings, lambda _: None)) as backend:
        prompt = [5 + i % 200 for i in range(PROMPT)]
        backend.kv.open(0, prompt, "", reuse="nothing")
        assert backend.kv.reserve(0, PROMPT + steps)
        token_id = int(backend.forward([Chunk(0, prompt, 0, "last")])[0].argmax())
        backend.kv.commit(0, 0, prompt)
        times = []
        for place in range(PROMPT, PROMPT + steps):
            began_s = time.perf_counter()
            logits = backend.forward([Chunk(0, [token_id], place, "last")])
            times.append(time.perf_counter() - began_s)
            backend.kv.commit(0, place, [token_id])
            token_id = int(logits[0].argmax())
        peaks = [peak_bytes(torch.device("cpu"))]
        if isinstance(backend, HFBackend) and isinstance(backend.runner, RankedRunner):
            peaks += backend.runner.peak_bytes()
    return Measured(1000 * statistics.median(times), [round(peak / 2**20, 1) for peak in peaks])


def in_process(path: Path, ranks: int, threads: int, steps: int) -> Measured:
    """The same, asked of a process of its own."""
    worker = ["--worker", str(path), str(ranks), str(threads), str(steps)]
    done = subprocess.run([sys.executable, "-m", "bench.ranks", *worker], capture_output=True, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def compared(path: Path, rounds: int, steps: int, bar: float) -> dict[str, Any]:
    """Both ways by turns."""
    runs: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, (ranks, threads) in WAYS.items():
            runs[way].append(in_process(path, ranks, threads, steps))
            print(f"{path.name}: {way}: {runs[way][-1].step_ms:.2f} ms", flush=True)
    medians = {way: statistics.median(one.step_ms for one in found) for way, found in runs.items()}
    one, two = medians.values()
    return {
        "step_ms": {way: [round(one.step_ms, 3) for one in found] for way, found in runs.items()},
        "peak_mib": {way: found[-1].peak_mib for way, found in runs.items()},
        "bar": verdict(f"{path.stem}: a step of two ranks, in steps of one", round(two / one, 3), bar),
    }


def gather_us(count: int = 2) -> float:
    """Microseconds of a gather of a row of SmolLM2's hidden states, between threads of this process."""
    from tightrope.backends.hf.ranks.gather import SharedGather, new_memory
    from tightrope.backends.tensor_parallel import Share

    memory = new_memory(count)
    gathers = [SharedGather(Share(rank, count), memory, 1) for rank in range(count)]
    os.close(memory)
    sizes = [WIDTH // count] * count

    def meet(gather: SharedGather) -> float:
        own = torch.ones(1, WIDTH // count)
        began_s = time.perf_counter()
        for _ in range(GATHERS):
            gather(own, sizes)
        return time.perf_counter() - began_s

    with ThreadPoolExecutor(count) as threads:
        return round(1e6 * max(threads.map(meet, gathers)) / GATHERS, 2)


def large(form: str, num_layers: int, folder: Path) -> Path:
    """A folder with layers of Yi-34B's shape."""
    sizes = {**YI_34B, "num_hidden_layers": num_layers, "vocab_size": SMALL_VOCABULARY}
    entries = {"exl2": exl2_entries, "gptq": gptq_entries}[form](sizes)
    path = folder / f"yi-34b-{form}-{num_layers}-layers"
    path.mkdir()
    write_sparse(path, sizes, entries)
    if form == "gptq":
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
        (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


def smollm2_folder() -> Path:
    """SmolLM2 in bf16, as the tests write it."""
    script = "from hf_models import smollm2_bf16; print(smollm2_bf16())"
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return Path(done.stdout.splitlines()[-1])


def bundled() -> Path:
    from tightrope.backends.locate import bundled_model

    return bundled_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="of Yi-34B's shape")
    parser.add_argument("--models", nargs="+", default=["smollm2-gguf", "smollm2-bf16", "exl2", "gptq"])
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        path, *numbers = options.worker
        found = run(Path(path), *map(int, numbers))
        print(json.dumps({"step_ms": found.step_ms, "peak_mib": list(found.peak_mib)}))
        return
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        paths: dict[str, Callable[[], Path]] = {"smollm2-gguf": bundled, "smollm2-bf16": smollm2_folder}
        for model in options.models:
            if model in paths:
                results[model] = compared(paths[model](), options.rounds, STEPS, SMOLLM2)
            else:
                path = large(model, options.layers, Path(name))
                results[model] = compared(path, options.rounds, STEPS // 4, LARGE)
    print(report.write("ranks", {"models": results, "gather_us": gather_us()}))
    print("\n".join(line(found["bar"]) for found in results.values()))


if __name__ == "__main__":
    main()
