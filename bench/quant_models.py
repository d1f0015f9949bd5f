"""What quantized files of one model cost in quality and give in speed, beside bf16 and llama.cpp's Q4_1.

    python -m bench.quant_models [--part speed]

The bundled SmolLM2 is quantized by the quantizers of the tests, once. Perplexity is of English text that they haven't
calibrated on, with a 16-bit cache. Decoding is one greedy stream; every server has the same threads and cache, all are
up at the same time and take turns. With --part only that part is measured, and the file keeps what it has of the other.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import report
from bench.compare import compared, results_of
from bench.english import NAME, english_text
from bench.load import exclusive
from bench.peers import PEERS, ROOT, Peer, Setup, StartFailed, end_servers_when_told
from bench.sse import RequestFailed
from bench.stats import Bar, Sample, judge
from bench.workloads import Scenario, run_streams
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.perplexity import cut_windows, measure

CONTEXT = 1024  # tokens of a window
NUM_TOKENS = 4096
LLAMA, BF16 = "llama.cpp server", "bf16"
WRITER = ROOT / "tests" / "support" / "quant_models.py"
QUIET_CORES = 0.25  # most that others may have used of the processors in a round that counts
LEAST = {LLAMA: 0.7, BF16: 1.5}  # of their decode speeds
BARRED = ("exl2-4.0bpw", "gptq-4bit")  # the forms that are held to them, by how their names begin


def write_models(forms: Iterable[str] | None = None) -> dict[str, Path]:
    """The folders of SmolLM2 by form: bf16 first, and beside it these, or all."""
    found = subprocess.run(
        [sys.executable, str(WRITER), *([] if forms is None else [",".join(forms)])],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    folders = [Path(line) for line in found.stdout.splitlines()]
    stem = folders[0].name.partition(BF16)[0]
    return {folder.name.removeprefix(stem).rpartition("-")[0]: folder for folder in folders}


def perplexities(models: dict[str, Path], tokens: int) -> Iterator[dict[str, Any]]:
    """Perplexity, size and file bytes of each form, and of the GGUF file at last. Any: ready for JSON."""
    settings = ModelSettings(max_model_len=CONTEXT, max_num_seqs=1, cache=CacheSettings(tokens=CONTEXT, dtype="f16"))
    loaders: dict[str, Callable[[], Backend]] = {
        form: partial(HFBackend, folder, settings, lambda share: None) for form, folder in models.items()
    }
    loaders["gguf"] = partial(GGUFBackend, bundled_model(), settings, lambda share: None)
    whole = english_text()
    text = whole[len(whole) * 3 // 4 :]
    bf16 = 0.0
    for form, load in loaders.items():
        with closing(load()) as backend:
            windows = cut_windows(
                backend.tokenizer.encode(text, parse_special=False, is_start=True), CONTEXT, None, tokens
            )
            with tqdm(total=len(windows) * (CONTEXT - 1), desc=form, unit="tok", disable=None) as bar:
                score = measure(backend, windows, lambda n: bar.update(n) and None)
            bf16 = bf16 or score.perplexity  # which comes first
            yield {
                "form": form,
                "format": backend.card.format,
                "file_bytes": _file_bytes(models.get(form, bundled_model())),
                "tokens": score.num_tokens,
                "perplexity": round(score.perplexity, 4),
                "over_bf16": round(score.perplexity / bf16, 4),
            }


def _file_bytes(model: Path) -> int:
    files = [model] if model.is_file() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def contestants(models: dict[str, Path]) -> list[Peer]:
    """Our server with each form, and llama.cpp's with the GGUF file; greedy, since that is the least work."""

    def arguments(folder: Path, setup: Setup, port: int) -> list[str]:
        return PEERS["tightrope"].arguments(replace(setup, model=folder), port)

    greedy: dict[str, object] = {"temperature": 0}
    ours = [Peer(form, partial(arguments, folder), extra_body=greedy) for form, folder in models.items()]
    return [*ours, replace(PEERS[LLAMA], extra_body=greedy)]


async def speeds(peers: Sequence[Peer], setup: Setup, tokens: int, rounds: int, lock: Path | None) -> list[Sample]:
    """One stream of `tokens` tokens from each server, round after round."""
    scenario = Scenario("1 stream", partial(run_streams, num_streams=1, max_tokens=tokens), rounds)
    return await compared(peers, setup, [scenario], rounds, lock=lock)


def verdicts_of(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """Decode speed of each form over that of llama.cpp and of bf16, and whether those with a bar reach it.

    Others at work meet servers that wait for two threads harder than those that take turns: such rounds don't count.
    """
    found: list[dict[str, object]] = []
    samples = [sample for sample in samples if sample.metrics["other_cores"] < QUIET_CORES]
    forms = dict.fromkeys(sample.server for sample in samples if sample.server not in LEAST)
    for form in forms:
        bars = [Bar(form, "1 stream", "decode_tokens_per_s", least, over) for over, least in LEAST.items()]
        for verdict in judge(samples, bars, ours=form):
            if not form.startswith(BARRED):
                verdict = {key: value for key, value in verdict.items() if key not in ("bar", "met")}
            found.append(verdict)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["perplexity", "speed"], help="measure only this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="length of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text-tokens", type=int, default=NUM_TOKENS, help="predicted for perplexity")
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    args = parser.parse_args()
    end_servers_when_told()
    with exclusive(args.lock):
        models = write_models()
    results = report.known("quant_models")
    if args.part != "speed":
        with exclusive(args.lock):
            rows: list[dict[str, Any]] = []
            results |= {"text": f"the last quarter of {NAME}", "context": CONTEXT, "perplexity": rows}
            for row in perplexities(models, args.text_tokens):
                rows.append(row)
                print(f"{row['form']}: perplexity {row['perplexity']}, {row['over_bf16']} of bf16's; {row['format']}")
                report.write("quant_models", results)  # each, so that a run that is cut short loses one at most
    if args.part != "perplexity":
        setup = Setup(bundled_model(), threads=args.threads, context=2048, slots=1)
        try:
            samples = asyncio.run(speeds(contestants(models), setup, args.tokens, args.rounds, args.lock))
        except (StartFailed, RequestFailed) as error:
            raise SystemExit(str(error)) from None
        speed = results_of(setup, samples, ratios=verdicts_of(samples))
        for ratio in speed["ratios"]:
            bar = f", bar {ratio['bar']} {'met' if ratio['met'] else 'MISSED'}" if "bar" in ratio else ""
            print(f"{ratio['name']}: {ratio['value']:.2f} times {ratio['over']}{bar}")
        report.write("quant_models", results | {"speed": speed})


if __name__ == "__main__":
    main()
