"""Decode steps of a model in two ranks of one thread, beside those of one rank of two threads, on this CPU.

    python -m bench.ranks [--rounds N] [--layers N] [--models NAME ...]

Models: SmolLM2, as its GGUF file and as a folder in bf16, and a few layers of Yi-34B's shape in EXL2 of 4.65 bits and
GPTQ of 4, whose codes are all zero: they take as long whatever they are. Each setting runs in processes of its own,
the two by turns; a time is the median of a run's steps, and a ratio that of the medians over all rounds. Also told are
what each rank takes of the memory, beside its plan (bench/rank_memory.py), and what a gather takes by itself. Writes
bench/results/ranks.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any  # JSON

import torch

from bench import rank_memory, report
from bench.gpu.random_weights import YI_34B, exl2_entries, gptq_entries, write_sparse
from bench.small_models import write_tokenizer
from bench.watch import line, verdict

PROMPT, STEPS = 64, 64  # Tokens, and decode steps behind them.
WAYS = {"one rank of two threads": (1, 2), "two ranks of one thread": (2, 2)}  # Ranks, and threads together.
SMOLLM2, LARGE = 2.0, 1.11  # bars: of a step of one rank, so that two have half of its speed, or nine tenths
APART = 0.03  # bar: a rank takes so much more or less than it is planned with, at most
SMALL_VOCABULARY = 320  # What is measured of the large ones are their layers.
GATHERS, WIDTH = 5000, 576
SUPPORT = Path(__file__).parents[1] / "tests" / "support"
RESULT = report.RESULTS / "ranks.json"  # Rows of models that a run leaves out stay as they are.


def step_ms(path: Path, ranks: int, threads: int, steps: int) -> float:
    """The median of a sequence's decode steps."""
    from tightrope.backends.detect import open_backend
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
    return 1000 * statistics.median(times)


def memory(path: Path, ranks: int, threads: int) -> list[dict[str, object]]:
    """What each rank takes, in MiB, and of its plan."""
    return [
        {
            "rank": one.rank,
            "weights_mib": _mib(one.weights),
            "cache_mib": _mib(one.cache),
            "workspace_mib": _mib(one.workspace),
            "taken_mib": _mib(one.taken),
            "of_plan": round(one.share, 4),
            "held_before_mib": _mib(one.before),
        }
        for one in rank_memory.measured(path, ranks, threads)
    ]


def _mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)


MEASURES: dict[str, Callable[..., Any]] = {"step_ms": step_ms, "memory": memory}


def in_process(measure: str, path: Path, *numbers: int) -> Any:  # noqa: ANN401 - JSON
    """One of MEASURES, in a process of its own: it may load but one model at its best."""
    worker = ["--worker", measure, str(path), *map(str, numbers)]
    done = subprocess.run([sys.executable, "-m", "bench.ranks", *worker], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(path: Path, rounds: int, steps: int, bar: float) -> dict[str, Any]:
    """Both ways by turns."""
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, (ranks, threads) in WAYS.items():
            runs[way].append(in_process("step_ms", path, ranks, threads, steps))
            print(f"{path.name}: {way}: {runs[way][-1]:.2f} ms", flush=True)
    one, two = (statistics.median(found) for found in runs.values())
    return {
        "step_ms": {way: [round(one, 3) for one in found] for way, found in runs.items()},
        "bar": verdict(f"{path.stem}: a step of two ranks, in steps of one", round(two / one, 3), bar),
    }


def beside_plan(path: Path) -> dict[str, Any]:
    """What ranks take, and by how much of its plan the one takes more or less that is farthest from it."""
    taken = {way: in_process("memory", path, *numbers) for way, numbers in WAYS.items()}
    of_two = list(taken.values())[-1]
    apart = max(abs(one["of_plan"] - 1) for one in of_two)
    bar = verdict(f"{path.stem}: memory of two ranks, apart from the plan", round(apart, 4), APART)
    print(f"{path.name}: {[one['of_plan'] for one in of_two]} of the plan", flush=True)
    return {"memory": taken, "memory_bar": bar}


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
    parser.add_argument("--memory-layers", type=int, default=8, help="of Yi-34B's shape where memory is measured")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure, path, *numbers = options.worker
        print(json.dumps(MEASURES[measure](Path(path), *map(int, numbers))))
        return
    results: dict[str, dict[str, Any]] = {}
    small: dict[str, Callable[[], Path]] = {"smollm2-gguf": bundled, "smollm2-bf16": smollm2_folder}
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            if model in small:
                path = deep = small[model]()
                steps, bar = STEPS, SMOLLM2
            else:
                path, deep = (large(model, count, Path(name)) for count in (options.layers, options.memory_layers))
                steps, bar = STEPS // 4, LARGE
            results[model] = compared(path, options.rounds, steps, bar) | beside_plan(deep)
    before = json.loads(RESULT.read_text("utf-8"))["results"]["models"] if RESULT.exists() else {}
    print(report.write("ranks", {"models": before | results, "gather_us": gather_us()}))
    print("\n".join(line(found[bar]) for found in results.values() for bar in ("bar", "memory_bar")))


if __name__ == "__main__":
    main()
