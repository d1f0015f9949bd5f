"""What the cache's storage costs: prefill and decode by types of keys and values and kind of attention.

    python -m bench.gguf_kv_cache [--part 1/4]

Runs the bundled model through llama.cpp without a server: a prompt of 3,500 tokens, then decode behind it with one
stream, with eight that share the prompt ("shared"), and with eight that hold an eighth of it each ("apart"). Attention
is our own, ggml's flash attention, or ggml's plain one. Decode times are medians; nothing else should run meanwhile.
With --part 1/4 every fourth setting is measured, and the file keeps what it has of the others.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from llama_cpp import llama_cpp as ll

from bench import report
from tightrope.backends.gguf.native import ContextOptions, ModelOptions, NativeContext, NativeModel
from tightrope.backends.locate import bundled_model
from tightrope.backends.threads import compute_threads

TYPES = {"f16": ll.GGML_TYPE_F16, "q8_0": ll.GGML_TYPE_Q8_0, "q4_0": ll.GGML_TYPE_Q4_0}
STREAMS = 8

OURS, FLASH, PLAIN = "ours", "ggml, flash", "ggml, plain"

Setting = tuple[str, str, str]  # keys, values, attention


def grid() -> list[Setting]:
    """Pairs of types that llama.cpp accepts, with each kind of attention that reads them."""
    pairs = [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "f16"), ("f16", "q8_0"), ("q4_0", "q4_0")]
    settings: list[Setting] = [(k, v, attention) for k, v in pairs for attention in (OURS, FLASH)]
    return settings + [(k, v, PLAIN) for k, v in pairs if v == "f16"]  # quantized values need flash attention


def measure(model: NativeModel, setting: Setting, prompt: int, steps: int) -> dict[str, object]:
    """Prefill seconds and decode milliseconds a step for one setting."""
    keys, values, attention = setting
    options = ContextOptions(
        num_cells=prompt + STREAMS * (steps + 2) + 256,
        max_seqs=STREAMS,
        batch_tokens=512,
        ubatch_tokens=512,
        max_outputs=STREAMS,
        threads=compute_threads(0),
        type_k=TYPES[keys],
        type_v=TYPES[values],
        flash_attention=attention != PLAIN,
        own_attention=attention == OURS,
    )
    context = NativeContext(model, options)
    prefill_s = _prefill(context, prompt)
    one_ms = _decode(context, [prompt], steps)
    context.remove_cells(0, prompt)
    for slot in range(1, STREAMS):
        context.copy_cells(0, slot, prompt)
    shared_ms = _decode(context, [prompt] * STREAMS, steps)
    share = prompt // STREAMS
    for slot in range(1, STREAMS):  # each gets a range of its own, at the positions where it lies
        context.remove_cells(slot, 0)
        context.copy_cells(0, slot, (slot + 1) * share, slot * share)
    context.remove_cells(0, share)
    apart_ms = _decode(context, [(slot + 1) * share for slot in range(STREAMS)], steps)
    context.close()
    return {
        "keys": keys,
        "values": values,
        "attention": attention,
        "prefill_s": round(prefill_s, 2),
        "prefill_tokens_per_s": round(prompt / prefill_s, 1),
        "decode_1_stream_ms": round(one_ms, 2),
        "decode_8_streams_shared_ms": round(shared_ms, 2),
        "decode_8_streams_apart_ms": round(apart_ms, 2),
    }


def _prefill(context: NativeContext, prompt: int) -> float:
    token_ids = np.random.default_rng(1).integers(1000, 40000, prompt)
    began = time.perf_counter()
    bounds = [*range(0, prompt, context.batch_tokens), prompt]
    for begin, end in pairwise(bounds):
        size = end - begin
        context.token_ids[:size] = token_ids[begin:end]
        context.positions[:size] = np.arange(begin, end)
        context.slots[:size] = 0
        context.outputs[:size] = 0
        context.outputs[size - 1] = end == prompt
        context.decode(0, size)
    context.logits(1)
    return time.perf_counter() - began


def _decode(context: NativeContext, depths: list[int], steps: int) -> float:
    """Median milliseconds of a step of one token for each sequence; `depths` are their next positions."""
    streams = len(depths)

    def step(index: int) -> None:
        context.token_ids[:streams] = 2000 + np.arange(streams)
        context.positions[:streams] = np.array(depths) + index
        context.slots[:streams] = np.arange(streams)
        context.outputs[:streams] = 1
        context.decode(0, streams)
        context.logits(streams)

    step(0)
    return statistics.median(_timed(step, 1 + i) for i in range(steps)) * 1000


def _timed(run: Callable[[int], None], index: int) -> float:
    began = time.perf_counter()
    run(index)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=3500, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=24, help="decode steps timed for each setting")
    parser.add_argument("--part", default="1/1", help="which share of the settings to measure, such as 2/4")
    args = parser.parse_args()
    part, parts = (int(word) for word in args.part.split("/"))
    model = NativeModel(bundled_model(), ModelOptions())
    rows = _known_rows()
    for setting in grid()[part - 1 :: parts]:
        rows[setting] = measure(model, setting, args.prompt, args.steps)
        print(rows[setting], flush=True)
    print(report.write("gguf_kv_cache", {"prompt_tokens": args.prompt, "settings": list(rows.values())}))


def _known_rows() -> dict[Setting, dict[str, object]]:
    rows = report.known("gguf_kv_cache").get("settings", [])
    known = ((tuple(row.get(name) for name in ("keys", "values", "attention")), row) for row in rows)
    return {setting: row for setting, row in known if setting in grid()}


if __name__ == "__main__":
    main()
