"""GGUF files in our own engine beside llama.cpp's server: python -m bench.gguf_engines [--model q4_1 q8_0 7b]

The bundled SmolLM2 as it comes (Q4_1), the same in Q8_0, and a llama of Mistral-7B's shape with random weights, of the
types of a Q4_K_M. Both servers of a file are up at the same time and take turns, with the same threads and a 16-bit
cache. Only the files that are named are measured; what the results have of others stays.
"""

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from bench import report
from bench.compare import bundled_model, compared, results_of
from bench.large_gguf import MISTRAL_7B, copy_keys, q4_k_m, write_llama
from bench.peers import PEERS, Setup, StartFailed, end_servers_when_told
from bench.sse import RequestFailed
from bench.stats import Bar, judge
from bench.workloads import Scenario, run_prompt, run_streams

OURS, THEIRS = "tightrope", "llama.cpp server"
NAME = "gguf_engines"


def write_q8_0(path: Path) -> Path:
    """The bundled model with all its matrices in Q8_0."""
    reader = GGUFReader(bundled_model())
    writer = GGUFWriter(path, "llama")
    copy_keys(writer)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            blocks = quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True, slots=True)
class Case:
    """A file and what writes it, with what is asked of its servers and the bars that ours is held to."""

    name: str
    file: str
    make: Callable[[Path], Path]
    scenarios: Sequence[Scenario]
    bars: Sequence[Bar]


def _bars(one: float, eight: float, prompt: float) -> list[Bar]:
    return [
        Bar("one stream, decode speed", "1 stream", "decode_tokens_per_s", one, THEIRS),
        Bar("eight streams, total tokens/s", "8 streams", "tokens_per_s", eight, THEIRS),
        Bar("prompt, times sooner", "prompt", "prompt_tokens_per_s", prompt, THEIRS),
    ]


_SMALL = [
    Scenario("1 stream", partial(run_streams, num_streams=1), rounds=5),
    Scenario("8 streams", partial(run_streams, num_streams=8, num_words=140), rounds=3),
    Scenario("prompt", partial(run_prompt, num_words=1920), rounds=3),
]
_LARGE = [
    Scenario("1 stream", partial(run_streams, num_streams=1, max_tokens=24), rounds=3),
    Scenario("prompt", partial(run_prompt, num_words=270), rounds=2),
]
CASES = {
    case.name: case
    for case in (
        Case("q4_1", "", lambda path: bundled_model(), _SMALL, _bars(1.3, 2.0, 2.0)),
        Case("q8_0", "smollm2-q8_0.gguf", write_q8_0, _SMALL, _bars(1.3, 2.0, 2.0)),
        Case(
            "7b",
            "7b-q4_k_m.gguf",
            lambda path: write_llama(path, MISTRAL_7B, MISTRAL_7B.layers, q4_k_m),
            _LARGE,
            _bars(1.0, 1.0, 1.5),
        ),
    )
}


async def measured(case: Case, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians and verdicts for one file. Any: ready for JSON."""
    setup = Setup(model, threads=options.threads, context=4096)
    scenarios = [scenario for scenario in case.scenarios if options.scenario in (None, scenario.name)]
    samples = await compared((PEERS[OURS], PEERS[THEIRS]), setup, scenarios, options.rounds, timeout_s=600)
    return results_of(setup, samples, bars=judge(samples, case.bars, ours=OURS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--scenario", help="only this; nothing is written then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="how often each scenario runs; default: its own number")
    parser.add_argument("--folder", type=Path, help="where files are made and kept; default: one that is deleted")
    options = parser.parse_args()
    end_servers_when_told()
    results = report.known(NAME)
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in options.model:
            case, file = CASES[name], folder / CASES[name].file
            try:
                results[name] = asyncio.run(measured(case, file if file.is_file() else case.make(file), options))
            except (StartFailed, RequestFailed) as error:
                raise SystemExit(str(error)) from None
            for bar in results[name]["bars"]:
                print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['name']}: {bar['value']:.2f}, bar {bar['bar']}")
            if options.scenario is None:
                report.write(NAME, results)


if __name__ == "__main__":
    main()
