"""What /metrics tells of the models that embed or rank, on a server that has any."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tightrope.engine.embedding.protocol import EmbeddingEngine


class EmbeddingMetrics(Collector):
    """Reads the second engine's numbers when somebody asks."""

    def __init__(self, embedder: EmbeddingEngine) -> None:
        self._embedder = embedder

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        one = self._embedder
        if not one.is_there:
            return
        for name, text, value in (
            ("ready", "1 while texts are taken", float(one.is_ready)),
            ("waiting", "Requests that are not answered yet", one.num_open),
            ("memory_bytes", "Memory of their process alone", one.private_bytes),
        ):
            yield GaugeMetricFamily(f"tightrope_embedding_{name}", text, value)
        for name, text, value in (
            ("requests", "Requests answered", one.num_requests),
            ("texts", "Texts of these", one.num_texts),
            ("tokens", "Tokens of these", one.num_tokens),
            ("restarts", "Times their process was started again", one.restarts),
        ):
            yield CounterMetricFamily(f"tightrope_embedding_{name}", text, value)
