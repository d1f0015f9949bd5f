"""vLLM's names in /metrics, for routers, autoscalers and dashboards that were written for it.

Names, types and labels are those of the engine of vLLM 0.9 and later; `gpu_cache_usage_perc` and `gpu_prefix_cache_*`
are older names of the same numbers, which its production stack's router still reads. Each has the labels `model_name`
and `engine`, which is 0: a model here has one engine.
"""

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tightrope.engine.types import Finish, FinishReason
from tightrope.server.models.model import Model
from tightrope.server.models.models import Models

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
ENGINE = "0"
LABELS = ("model_name", "engine")
_REASONS: dict[FinishReason, str] = {
    "eos": "stop",
    "stop_token": "stop",
    "stop_string": "stop",
    "length": "length",
    "error": "error",
}
ABORTED = "abort"


class VllmHistograms:
    """What is counted at the end of each answer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, LABELS, buckets=bounds, registry=registry)

        self._ends = Counter(
            "vllm:request_success", "Answers by their end", (*LABELS, "finished_reason"), registry=registry
        )
        self._first = histogram("time_to_first_token_seconds", "Seconds to the first token", SECONDS)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Seconds of decode per token behind the first", SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "Seconds from arrival to the last token", SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Seconds waiting for a turn", SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "Seconds of prefill", SECONDS)
        self._decode = histogram("request_decode_time_seconds", "Seconds of decode", SECONDS)
        self._inference = histogram("request_inference_time_seconds", "Seconds of prefill and decode", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of the prompt", TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens generated", TOKENS)

    def finished(self, model_name: str, finish: Finish, prompt_tokens: int | None, took_s: float) -> None:
        """Count one answer that ended. prompt_tokens: None where it was not told."""
        labels = (model_name, ENGINE)
        self._ends.labels(*labels, _REASONS[finish.reason]).inc()
        if finish.reason == "error":
            return
        times = finish.timings
        self._whole.labels(*labels).observe(took_s)
        self._first.labels(*labels).observe(times.queue_s + times.prefill_s)
        self._queue.labels(*labels).observe(times.queue_s)
        self._prefill.labels(*labels).observe(times.prefill_s)
        self._decode.labels(*labels).observe(times.decode_s)
        self._inference.labels(*labels).observe(times.prefill_s + times.decode_s)
        self._generated.labels(*labels).observe(finish.num_tokens)
        if prompt_tokens is not None:
            self._prompt.labels(*labels).observe(prompt_tokens)
        if finish.num_tokens > 1:
            self._per_token.labels(*labels).observe(times.decode_s / (finish.num_tokens - 1))

    def aborted(self, model_name: str, number: int) -> None:
        """Count answers whose client hung up."""
        self._ends.labels(model_name, ENGINE, ABORTED).inc(number)


def vllm_snapshot(models: Models) -> Iterator[Metric]:
    """What is read from the engines when it is asked for, of each model that is loaded."""
    loaded = [model for model in models.all if model.state == "loaded" and model.engine.info is not None]
    for name, text, read in _GAUGES:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        for model in loaded:
            gauge.add_metric([model.name, ENGINE], read(model))
        yield gauge
    for name, text, read in _COUNTERS:
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
        for model in loaded:
            counter.add_metric([model.name, ENGINE], read(model))
        yield counter
    yield from _adapters(loaded)


def _adapters(loaded: Iterable[Model]) -> Iterator[Metric]:
    """Adapters that requests may name, with the time as the value: whoever reads it takes the newest.

    All of them are ready whenever the model is, so none waits, and there can't be more of them in a step.
    """
    labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
    gauge = GaugeMetricFamily("vllm:lora_requests_info", "Adapters that are loaded", labels=labels)
    names = sorted({name for model in loaded for name in model.adapters})
    if names:
        gauge.add_metric([str(len(names)), "", ",".join(names)], time.time())
        yield gauge


def _cache_share(model: Model) -> float:
    stats = model.engine.stats
    return stats.cache_used / stats.cache_capacity if stats.cache_capacity else 0.0


_GAUGES = (
    ("num_requests_running", "Sequences running", lambda model: float(model.engine.num_running)),
    ("num_requests_waiting", "Requests and sequences waiting", lambda m: float(m.engine.num_waiting + len(m.waiting))),
    ("kv_cache_usage_perc", "Share of the cache that running sequences hold, 0 to 1", _cache_share),
    ("gpu_cache_usage_perc", "The same under its older name", _cache_share),
)
_COUNTERS = (
    ("prompt_tokens", "Prompt tokens taken in", lambda model: model.engine.stats.prompt_tokens),
    ("generation_tokens", "Tokens generated", lambda model: model.engine.stats.generated_tokens),
    ("prefix_cache_queries", "Prompt tokens looked for in the cache", lambda model: model.engine.stats.prompt_tokens),
    ("prefix_cache_hits", "Prompt tokens found in the cache", lambda model: model.engine.stats.cached_tokens),
    ("gpu_prefix_cache_queries", "The same under its older name", lambda model: model.engine.stats.prompt_tokens),
    ("gpu_prefix_cache_hits", "The same under its older name", lambda model: model.engine.stats.cached_tokens),
    ("num_preemptions", "Times a sequence made room for another", lambda model: model.engine.stats.preemptions),
)
