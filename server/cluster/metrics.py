"""What /metrics tells of each replica, beside what it tells of all together."""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tightrope.server.cluster.link import Link
from tightrope.server.cluster.pool import Pool
from tightrope.server.models.models import Models

_GAUGES: tuple[tuple[str, str, Callable[[Link], float]], ...] = (
    ("up", "1 while it takes requests", lambda link: float(link.is_up and not link.is_draining)),
    ("running", "Sequences running", lambda link: link.exchange.stats.num_running),
    ("waiting", "Sequences waiting for a turn", lambda link: link.exchange.stats.num_waiting),
    ("cache_used_tokens", "Cached tokens of running sequences", lambda link: link.exchange.stats.cache_used),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Link], int]], ...] = (
    ("prompt_tokens", "Prompt tokens taken in", lambda link: link.exchange.stats.prompt_tokens),
    ("reused_tokens", "Prompt tokens found in its cache", lambda link: link.exchange.stats.cached_tokens),
    ("generated_tokens", "Tokens generated", lambda link: link.exchange.stats.generated_tokens),
    ("finished", "Answers finished", lambda link: link.exchange.stats.finished),
)


class PoolMetrics(Collector):
    """Reads the replicas' latest Stats when it is asked for them."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return ()  # Otherwise registering would collect once, before there is anything to read.

    def collect(self) -> Iterable[Metric]:
        engines = [model.engine for model in self._models.all]
        links = [link for engine in engines if isinstance(engine, Pool) for link in engine.replicas.all]
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"tightrope_replica_{name}", text, labels=["replica"])
            for link in links:
                gauge.add_metric([link.name], read(link))
            yield gauge
        for name, text, count in _COUNTERS:
            counter = CounterMetricFamily(f"tightrope_replica_{name}", text, labels=["replica"])
            for link in links:
                counter.add_metric([link.name], count(link))
            yield counter
