"""What /metrics tells: TGI's names, which dashboards chart, vLLM's, which routers read, and tightrope's own.

Each app has its own registry, so that nothing is global. TGI's counters lack the `_total` that prometheus-client puts
behind every counter; they are exposed as untyped, which `rate()` takes as well.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Literal
from weakref import WeakSet

import msgspec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from tightrope.engine.embedding.protocol import EmbeddingEngine
from tightrope.engine.errors import EngineError, InvalidRequest, Overloaded
from tightrope.engine.protocol import Engine
from tightrope.engine.types import Delta, Finish, GenerateRequest, Stats
from tightrope.server.http.embedding_metrics import EmbeddingMetrics
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.http.vllm_metrics import VllmHistograms, vllm_snapshot
from tightrope.server.models.model import Model
from tightrope.server.models.models import Models

Failure = Literal["validation", "template", "overloaded", "generation", "dropped"]

_FAILURES: tuple[tuple[type[EngineError], Failure], ...] = (  # The first that an error is of counts.
    (TemplateFailed, "template"),
    (InvalidRequest, "validation"),
    (Overloaded, "overloaded"),
)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics:
    """Counts one app's requests; everything else is read from the engines' latest Stats when somebody asks."""

    def __init__(self, models: Models, embedder: EmbeddingEngine | None = None) -> None:
        self._failures: dict[Failure, int] = {}
        self._counted: WeakSet[EngineError] = WeakSet()
        self.num_requests = 0
        self.num_succeeded = 0
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(_Snapshot(self, models))
        if embedder is not None:
            self._registry.register(EmbeddingMetrics(embedder))
        self._duration = self._histogram("tgi_request_duration", "Seconds from arrival to the last token", SECONDS)
        self._queue = self._histogram("tgi_request_queue_duration", "Seconds waiting for a turn", SECONDS)
        self._inference = self._histogram("tgi_request_inference_duration", "Seconds in prefill and decode", SECONDS)
        self._per_token = self._histogram(
            "tgi_request_mean_time_per_token_duration", "Seconds of decode per generated token", SECONDS
        )
        self._first = self._histogram("tightrope_request_first_token_duration", "Seconds to the first token", SECONDS)
        self._generated = self._histogram("tgi_request_generated_tokens", "Tokens generated", TOKENS)
        self._input = self._histogram("tgi_request_input_length", "Tokens of the prompt", TOKENS)
        self._max_new = self._histogram("tgi_request_max_new_tokens", "Tokens asked for", TOKENS)
        self._vllm = VllmHistograms(self._registry)

    def add(self, collector: Collector) -> None:
        """Tell what this collects, too."""
        self._registry.register(collector)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=bounds, registry=self._registry)

    async def generate(self, engine: Engine, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """An engine's `generate`, counted and timed. Raises what it raises."""
        began, num_open, has_failed = time.perf_counter(), request.n, False
        name, prompt_tokens = self._name_of(engine), None
        self.num_requests += 1
        if request.stop.max_tokens is not None:
            self._max_new.observe(request.stop.max_tokens)
        try:
            async with aclosing(engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.prompt is not None and delta.index == 0:
                        prompt_tokens = delta.prompt.num_tokens
                        self._input.observe(prompt_tokens)
                    if delta.finish is not None:
                        num_open -= 1
                        has_failed |= delta.finish.reason == "error"
                        self._observe(delta.finish)
                        self._vllm.finished(name, delta.finish, prompt_tokens, time.perf_counter() - began)
                    yield delta
        except EngineError as error:
            self._count_failure(error)
            num_open = 0
            has_failed = True
            raise
        finally:
            if num_open:  # It was closed before its end, since the client hung up.
                self._fail("dropped")
                self._vllm.aborted(name, num_open)
            elif not has_failed:
                self.num_succeeded += 1
                self._duration.observe(time.perf_counter() - began)

    def _name_of(self, engine: Engine) -> str:
        """What requests call the model of an engine; empty before it was loaded for the first time."""
        return next((model.name for model in self._models.all if model.engine is engine), "")

    def _observe(self, finish: Finish) -> None:
        if finish.reason == "error":
            self._fail("generation")
            return
        times = finish.timings
        self._queue.observe(times.queue_s)
        self._first.observe(times.queue_s + times.prefill_s)
        self._inference.observe(times.prefill_s + times.decode_s)
        self._generated.observe(finish.num_tokens)
        if finish.num_tokens > 1:  # The first one came with the prefill.
            self._per_token.observe(times.decode_s / (finish.num_tokens - 1))

    def refused(self, error: EngineError) -> None:
        """Count a request that was answered with `error`, unless `generate` has counted it already."""
        if error not in self._counted and isinstance(error, InvalidRequest | Overloaded):
            self.num_requests += 1
            self._count_failure(error)

    def _count_failure(self, error: EngineError) -> None:
        self._counted.add(error)
        self._fail(next((why for kind, why in _FAILURES if isinstance(error, kind)), "generation"))

    def _fail(self, why: Failure) -> None:
        self._failures[why] = self._failures.get(why, 0) + 1

    def failures(self) -> dict[Failure, int]:
        """How many requests failed, by reason."""
        return dict(self._failures)

    def render(self) -> bytes:
        """The answer to GET /metrics, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


class _Snapshot(Collector):
    """Reads counters and the engines' Stats when they are asked for."""

    def __init__(self, metrics: Metrics, models: Models) -> None:
        self._metrics = metrics
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return ()  # Otherwise registering would collect once, before there is anything to read.

    def collect(self) -> Iterable[Metric]:
        yield from self._requests()
        yield from self._tgi_batches()
        yield from self._own()
        yield from self._of_models()
        yield from vllm_snapshot(self._models)

    def _engines(self) -> list[Engine]:
        return [model.engine for model in self._models.loaded]

    def _stats(self) -> Stats:
        """Those of all loaded models together."""
        every = [msgspec.structs.astuple(engine.stats) for engine in self._engines()]
        return Stats(*map(sum, zip(*every, strict=True)))

    def _requests(self) -> Iterable[Metric]:
        yield UnknownMetricFamily("tgi_request_count", "Requests to generate", self._metrics.num_requests)
        yield UnknownMetricFamily("tgi_request_success", "Requests answered whole", self._metrics.num_succeeded)
        failures = UnknownMetricFamily("tgi_request_failure", "Requests that failed, by reason", labels=["err"])
        for why, number in self._metrics.failures().items():
            failures.add_metric([why], number)
        yield failures

    def _tgi_batches(self) -> Iterable[Metric]:
        stats, engines = self._stats(), self._engines()
        num_waiting = sum(engine.num_waiting for engine in engines)
        num_running = sum(engine.num_running for engine in engines)
        yield GaugeMetricFamily("tgi_queue_size", "Sequences waiting for a turn", num_waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Sequences running", num_running)
        yield GaugeMetricFamily("tgi_batch_current_max_tokens", "Cached tokens of running sequences", stats.cache_used)
        yield GaugeMetricFamily("tgi_batch_total_tokens", "Tokens the cache can hold", stats.cache_capacity)
        yield UnknownMetricFamily("tgi_batch_inference_count", "Steps begun", stats.steps)
        yield UnknownMetricFamily("tgi_batch_inference_success", "Steps done", stats.steps)
        for name, text, seconds in (
            ("tgi_batch_inference_duration", "Seconds per step", stats.step_s),
            ("tgi_batch_forward_duration", "Seconds per step in the model", stats.forward_s),
            ("tgi_batch_decode_duration", "Seconds per step in the sampler", stats.sample_s),
        ):
            yield SummaryMetricFamily(name, text, count_value=stats.steps, sum_value=seconds)

    def _of_models(self) -> Iterable[Metric]:
        """Of each model that is loaded, or was; of others there may be thousands, with nothing to tell."""
        states = GaugeMetricFamily("tightrope_model_state", "1 for the state of a model", labels=["model", "state"])
        loads = CounterMetricFamily("tightrope_model_loads", "Times a model was loaded", labels=["model"])
        numbers: dict[str, tuple[str, Callable[[Model], int]]] = {
            "running": ("Sequences running", lambda model: model.engine.num_running),
            "waiting": ("Requests and sequences waiting", lambda m: m.engine.num_waiting + len(m.waiting)),
            "generated_tokens": ("Tokens since it was loaded", lambda model: model.engine.stats.generated_tokens),
            "memory_bytes": ("Memory of its process alone", lambda model: model.engine.private_bytes),
        }
        gauges = {
            name: GaugeMetricFamily(f"tightrope_model_{name}", text, labels=["model"])
            for name, (text, _) in numbers.items()
        }
        for model in self._models.all:
            if model.state != "unloaded" or model.num_loads or model.waiting:
                states.add_metric([model.name, model.state], 1)
                loads.add_metric([model.name], model.num_loads)
                for name, (_, read) in numbers.items():
                    gauges[name].add_metric([model.name], read(model))
        yield from (states, loads, *gauges.values())

    def _own(self) -> Iterable[Metric]:
        stats = self._stats()
        restarts = sum(engine.restarts for engine in self._engines())
        yield GaugeMetricFamily("tightrope_ready", "1 while a model answers", float(self._models.is_healthy))
        yield CounterMetricFamily("tightrope_engine_restarts", "Times an engine was started again", restarts)
        cache = GaugeMetricFamily("tightrope_cache_tokens", "Tokens in the cache, by what holds them", labels=["state"])
        cache.add_metric(["used"], stats.cache_used)
        cache.add_metric(["reusable"], stats.cache_reusable)
        cache.add_metric(["free"], stats.cache_capacity - stats.cache_used - stats.cache_reusable)
        yield cache
        for name, text, number in (
            ("tightrope_prompt_tokens", "Prompt tokens taken in", stats.prompt_tokens),
            ("tightrope_reused_tokens", "Prompt tokens found in the cache", stats.cached_tokens),
            ("tightrope_moved_tokens", "Of these, moved from other places in a chat", stats.moved_tokens),
            ("tightrope_healed_tokens", "Tokens computed again over moved ones", stats.healed_tokens),
            ("tightrope_generated_tokens", "Tokens generated", stats.generated_tokens),
            ("tightrope_finished", "Answers finished", stats.finished),
            ("tightrope_cancelled", "Answers cancelled by their client", stats.cancelled),
            ("tightrope_preemptions", "Times a sequence made room for another", stats.preemptions),
        ):
            yield CounterMetricFamily(name, text, number)
