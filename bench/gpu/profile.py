"""A synthetic EXL2 model of Yi-34B's shape in 24 GiB, at 24,000 tokens: decode and prompts, and the kernels in both.

The weights are drawn on the device tensor by tensor, as files would have them, and loaded by the server's own loader.
Where exllamav2 is installed the model runs by its kernels, too.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.random_weights import SMALL, YI_34B, RandomWeights, exl2_entries, random_model
from bench.gpu.run import Row, Run, compared, tried
from bench.gpu.steps import cache_bytes, model_step, noisy_caches, record_all
from bench.gpu.timing import seconds
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.run.graphs import recordings
from tightrope.backends.quant.find import find_quantization
from tightrope.kernels import exllama
from tightrope.kernels.forms.layout import LayerCache

BAR = 0.6  # share of the roofline that decode must reach
CAP = 24 << 30  # bytes
CONTEXT, CHUNKS = 24_000, (512, 2048)  # tokens: cached, and of a prompt's last chunk
AGREE = 0.05  # largest difference of logits between kernels, of the largest logit: theirs are sums in float16
MAX_NUM_SEQS = 16  # sequences at a time, as the server has them where nobody says
MOST_KERNELS = 20  # of a step that are listed, by their time


def rows(run: Run) -> Iterator[Row]:
    """For each of the kernels: what loading took, times of steps, and of the kernels in them."""
    ways: list[tuple[str, AbstractContextManager[object]]] = [
        ("Triton", patch.object(exllama, "extension", return_value=None))
    ]
    if run.device.type == "cuda":
        total = torch.cuda.get_device_properties(run.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
        if exllama.extension() is not None:
            ways.append(("exllamav2", nullcontext()))
    first: list[Tensor] = []
    for name, way in ways:
        with way:
            for row in _of_model(run, name, first):
                yield {"kernels": name, **row}
        gc.collect()  # modules refer to each other
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _of_model(run: Run, name: str, first: list[Tensor]) -> Iterator[Row]:
    sizes = SMALL if run.is_smoke else YI_34B
    context, chunks = (48, (5, 20)) if run.is_smoke else (CONTEXT, CHUNKS)
    model, weights = random_model(sizes, exl2_entries(sizes), run.device, print)
    caches = noisy_caches(model, context)
    yield {"step": "loaded", **_memory(run)}
    eager = model_step(model, caches, ((1, context),))
    with torch.inference_mode():
        bar = BAR if name == "Triton" else None
        yield tried({"step": "decode"}, partial(_decode, run, model, weights, caches, context, bar))
        yield tried({"step": "decode, agreeing"}, partial(_agree, eager, first))
        yield from _kernels(run, "decode", eager)
        for chunk in chunks:
            prompt = model_step(model, caches, ((chunk, context),))
            title: Row = {"step": f"{chunk} tokens of a prompt"}
            yield tried(title, partial(_prompt, run, prompt, chunk))
            yield from _kernels(run, f"{chunk} tokens of a prompt", prompt)
        yield tried({"step": "recording all"}, partial(_recordings, run, model, caches, context))
    yield {"step": "peak", **_memory(run)}


def _decode(
    run: Run, model: LoadedModel, weights: RandomWeights, caches: Sequence[LayerCache], context: int, bar: float | None
) -> Row:
    """A recorded step, and what its recording takes of the card."""
    quantization = find_quantization(weights.folder, {}, weights)
    assert quantization is not None
    table = weights.tensors["model.embed_tokens.weight"].num_bytes  # of which a step reads a row
    num_bytes = quantization.memory_bytes - table + cache_bytes(model, context)
    step = model_step(model, caches, ((1, context),), is_recorded=True)
    time = seconds(step, run.device, run.repeats)
    return {
        "bits_per_weight": quantization.bits_per_weight,
        "context": context,
        "step_bytes": num_bytes,
        "step_ms": time * 1e3,
        "tokens_per_s": 1 / time,
        **run.judged(num_bytes, time, bar),
    }


def _recordings(run: Run, model: LoadedModel, caches: Sequence[LayerCache], context: int) -> Row:
    """What the recordings of decode steps take of the card that a server makes while it loads."""
    sizes = recordings(MAX_NUM_SEQS, context)
    if run.device.type != "cuda":
        record_all(model, caches, MAX_NUM_SEQS, context)
        return {"recordings": len(sizes)}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info(run.device)
    begun_s = time.perf_counter()
    kept = record_all(model, caches, MAX_NUM_SEQS, context)
    torch.cuda.synchronize()
    took_s = time.perf_counter() - begun_s
    torch.cuda.empty_cache()
    after, _ = torch.cuda.mem_get_info(run.device)
    del kept
    return {"recordings": len(sizes), "recordings_s": took_s, "recordings_bytes": before - after}


def _agree(step: Callable[[], Tensor], first: list[Tensor]) -> Row:
    """Logits beside those of the kernels that came first."""
    logits = step().float().cpu()
    first.append(logits)
    return compared(logits, first[0], AGREE)


def _prompt(run: Run, step: Callable[[], Tensor], num_tokens: int) -> Row:
    time = seconds(step, run.device, 3)
    return {"step_ms": time * 1e3, "tokens_per_s": num_tokens / time}


def _kernels(run: Run, name: str, step: Callable[[], Tensor]) -> Iterator[Row]:
    """What runs on the device in one step, the longest first: how often, and how long in all."""
    is_card = run.device.type == "cuda"
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_card else [])]
    try:
        with profile(activities=activities) as profiled:
            step()
            if is_card:
                torch.cuda.synchronize()
    except RuntimeError as error:  # of a profiler that can't be had; the times above stay
        yield {"step": name, "not_profiled": str(error)[:300]}
        return
    found = [
        (event.self_device_time_total if is_card else event.self_cpu_time_total, event.count, event.key)
        for event in profiled.key_averages()
        if (event.device_type == DeviceType.CUDA) is is_card
    ]
    for us, count, kernel in sorted(found, reverse=True)[:MOST_KERNELS]:
        yield {"step": name, "kernel": kernel[:120], "launches": count, "us": us}
    yield {"step": name, "kernel": "all", "launches": sum(n for _, n, _ in found), "us": sum(us for us, _, _ in found)}


def _memory(run: Run) -> Row:
    """Of the card, in bytes: held for tensors, the most that was, and the process's limit."""
    if run.device.type != "cuda":
        return {}
    return {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "cap_bytes": CAP,
    }
