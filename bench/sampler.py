"""What drawing a token costs, against a decode step of 10 ms with one stream and 25 ms with eight.

    python -m bench.sampler

Times sample() and the appending of what was drawn, in one thread, for each setting and batch size, and with the output
growing as it does in a server. The rows fall off as powers of the rank with exponents from 1.3 to 2.5, as a small
model's do: to hold 95 % of the mass at temperature 1 takes 4 tokens at the median and 3,000 at worst. The bar is 3 % of
the step, on the mean.
"""

import statistics
import time

import torch
from msgspec import structs

from bench import report
from tightrope.engine.sampler.sampler import sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import LogprobRequest

VOCAB_SIZE = 49152
CONTEXT = 3000  # tokens of the prompt, which a repetition penalty looks at
NUM_ROWS = 64  # different rows, drawn from in turn
STEPS = 300
BARS_MS = {1: 0.3, 8: 0.75}  # streams: 3 % of 10 ms and of 25 ms

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "usual": SamplingParams(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.15),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "top_p 0.95": SamplingParams(top_p=0.95),
    "top_p 0.95 at 0.7": SamplingParams(top_p=0.95, temperature=0.7),
    "temperature 1": SamplingParams(),
}
CHAT_SETTINGS = {  # for which the bar is only a measure
    "chat": SamplingParams(
        temperature=1.3, min_p=0.05, dry_multiplier=0.8, xtc_probability=0.5, order=("min_p", "xtc", "temperature")
    ),
    "smoothing": SamplingParams(smoothing_factor=0.3, min_p=0.02),
    "dynamic": SamplingParams(dynatemp_range=0.5, min_p=0.05),
    "tfs": SamplingParams(tfs=0.95),
    "mirostat": SamplingParams(mirostat_mode=2),
    "adaptive-p": SamplingParams(min_p=0.05, adaptive_target=0.5),
}
HARD_DRY = SamplingParams(  # as unkind as a request may be: every length of breaker, and a range beyond the context
    dry_multiplier=1.0,
    dry_base=1e30,
    dry_range=10**9,
    dry_sequence_breakers=tuple(f"{i:x}" * (1 + i % 12) for i in range(10_000)),
)
HARD_BAR_MS = 1.0  # a token
LOGPROBS = {
    "none": None,
    "raw, top 5": LogprobRequest(processed=False, top=5),
    "processed, top 5": LogprobRequest(processed=True, top=5),
}


def logits_like_a_models(generator: torch.Generator) -> torch.Tensor:
    """[NUM_ROWS, VOCAB_SIZE] float32: a power law of the rank, at random places."""
    exponents = torch.linspace(1.3, 2.5, NUM_ROWS)[torch.randperm(NUM_ROWS, generator=generator)]
    ranks = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(NUM_ROWS)])
    noise = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator) * 0.3
    return 12 - exponents[:, None] * (ranks + 1).log() + noise


def _token_bytes(token_id: int) -> bytes:
    """Text for DRY's breakers to be looked for in."""
    return b"%x " % token_id


def time_steps(logits: torch.Tensor, states: list[SamplerState]) -> list[float]:
    """Milliseconds of each of STEPS steps, after a few to warm up; every drawn token is appended."""
    num = len(states)
    times: list[float] = []
    for step in range(-20, STEPS):
        start = step * num % NUM_ROWS
        rows = logits[start : start + num].clone()
        began = time.perf_counter()
        drawn = sample(rows, states, may_overwrite=True)
        for state, sampled in zip(states, drawn, strict=True):
            assert sampled is not None
            state.append(sampled.token_id, sampled.surprise)
        elapsed = time.perf_counter() - began
        if step >= 0:
            times.append(elapsed * 1e3)
    return times


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = logits_like_a_models(generator)
    prompts = (VOCAB_SIZE ** torch.rand(8, CONTEXT, generator=generator)).long().tolist()  # by Zipf's law
    results = []
    print(f"{'setting':20} {'logprobs':18} {'streams':>7} {'mean ms':>8} {'median':>8} {'p95':>8} {'bar':>6}")
    for name, params in (SETTINGS | CHAT_SETTINGS | {"dry, 10,000 breakers": HARD_DRY}).items():
        for wanted, request in LOGPROBS.items() if name in SETTINGS else [("none", None)]:
            for streams, bar in BARS_MS.items():
                bar = HARD_BAR_MS * streams if params is HARD_DRY else bar
                states = [
                    SamplerState(structs.replace(params, seed=i), prompts[i], VOCAB_SIZE, request, None, _token_bytes)
                    for i in range(streams)
                ]
                times = time_steps(logits, states)
                mean, median = statistics.fmean(times), statistics.median(times)
                p95 = statistics.quantiles(times, n=20)[-1]
                met = mean <= bar
                results.append(
                    {
                        "setting": name,
                        "logprobs": wanted,
                        "streams": streams,
                        "mean_ms": round(mean, 4),
                        "median_ms": round(median, 4),
                        "p95_ms": round(p95, 4),
                        "bar_ms": bar,
                        "met": met,
                    }
                )
                verdict = "" if met else "  over"
                print(f"{name:20} {wanted:18} {streams:7} {mean:8.3f} {median:8.3f} {p95:8.3f} {bar:6.2f}{verdict}")
    print(report.write("sampler", {"vocab_size": VOCAB_SIZE, "context": CONTEXT, "steps": STEPS, "timings": results}))


if __name__ == "__main__":
    main()
