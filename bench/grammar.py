"""What a grammar costs, against a decode step of 10 ms with one stream and 25 ms with eight.

    python -m bench.grammar

Times sample() with a grammar and without, masks on all cores and the rest in one thread, over the vocabulary of the
bundled model and logits like a model's, and with it what follows the drawn token through its grammar. The bar is 10 %
of the step, on the mean. Also: how long the vocabulary and each grammar take to compile, once.
"""

import json
import statistics
import time

import torch

from bench import report
from bench.sampler import NUM_ROWS, VOCAB_SIZE, logits_like_a_models
from tightrope.backends.detect import open_backend
from tightrope.backends.settings import ModelSettings
from tightrope.engine.guided.grammar import Grammars
from tightrope.engine.sampler.sampler import sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import Grammar

STEPS = 200
BARS_MS = {1: 1.0, 8: 2.5}  # streams: 10 % of 10 ms and of 25 ms
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
GRAMMARS = {
    "none": None,
    "any object": Grammar("json_schema", '{"type": "object"}', "json"),
    "schema": Grammar("json_schema", json.dumps(PERSON), "json"),
    "regex": Grammar("regex", r"([A-Za-z ,]+: [0-9]+\n)+", "regex"),
    "gbnf": Grammar("grammar", 'root ::= (word (" " | ", "))+ "."\nword ::= [a-z]+ | "\\"" [^"]* "\\""', "grammar"),
}


def time_steps(logits: torch.Tensor, compiled: Grammars, grammar: Grammar | None, streams: int) -> list[float]:
    """Milliseconds of each of STEPS steps, after a few to warm up; an answer that is complete begins anew."""

    def state(seed: int) -> SamplerState:
        matcher = None if grammar is None else compiled.matcher(grammar)
        return SamplerState(SamplingParams(temperature=0.7, top_p=0.9, seed=seed), [], logits.shape[1], None, matcher)

    states = [state(seed) for seed in range(streams)]
    times: list[float] = []
    for step in range(-20, STEPS):
        start = step * streams % NUM_ROWS
        rows = logits[start : start + streams].clone()
        began = time.perf_counter()
        drawn = sample(rows, states, may_overwrite=True)
        for row, sampled in enumerate(drawn):
            assert sampled is not None
            states[row].append(sampled.token_id)
        elapsed = time.perf_counter() - began
        if step >= 0:
            times.append(elapsed * 1e3)
        for row in range(streams):
            if states[row].has_complete_text:
                states[row] = state(step * streams + row + streams)
    return times


def main() -> None:
    torch.set_num_threads(1)
    backend = open_backend(ModelSettings(), lambda share: None)
    assert backend.tokenizer.vocab_size == VOCAB_SIZE
    logits = logits_like_a_models(torch.Generator().manual_seed(0))
    began = time.perf_counter()
    compiled = Grammars(backend.tokenizer)
    vocabulary_ms = (time.perf_counter() - began) * 1e3
    results = []
    print(f"the vocabulary of {VOCAB_SIZE} tokens, once: {vocabulary_ms:.0f} ms")
    print(f"{'grammar':12} {'compile ms':>10} {'streams':>7} {'mean ms':>8} {'median':>8} {'p95':>8} {'bar':>6}")
    for name, grammar in GRAMMARS.items():
        began = time.perf_counter()
        if grammar is not None:
            compiled.matcher(grammar)
        compile_ms = (time.perf_counter() - began) * 1e3
        for streams, bar in BARS_MS.items():
            times = time_steps(logits, compiled, grammar, streams)
            mean, median = statistics.fmean(times), statistics.median(times)
            p95 = statistics.quantiles(times, n=20)[-1]
            results.append(
                {
                    "grammar": name,
                    "compile_ms": round(compile_ms, 3),
                    "streams": streams,
                    "mean_ms": round(mean, 4),
                    "median_ms": round(median, 4),
                    "p95_ms": round(p95, 4),
                    "bar_ms": bar,
                    "met": mean <= bar,
                }
            )
            verdict = "" if mean <= bar else "  over"
            print(f"{name:12} {compile_ms:10.2f} {streams:7} {mean:8.3f} {median:8.3f} {p95:8.3f} {bar:6.2f}{verdict}")
    backend.close()
    print(
        report.write(
            "grammar",
            {"vocab_size": VOCAB_SIZE, "vocabulary_ms": round(vocabulary_ms, 1), "steps": STEPS, "timings": results},
        )
    )


if __name__ == "__main__":
    main()
