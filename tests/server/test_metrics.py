"""What /metrics counts."""

from collections.abc import AsyncGenerator

import httpx
import pytest
from one_model import no_other
from prometheus_client.parser import text_string_to_metric_families
from real_server import RunningServer

from tightrope.engine.errors import EngineError, EngineUnavailable, InvalidRequest, Overloaded
from tightrope.engine.types import (
    Delta,
    Finish,
    FinishReason,
    GenerateRequest,
    PromptInfo,
    Stats,
    StopRules,
    TextPrompt,
    Timings,
)
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.http.metrics import Metrics
from tightrope.server.models.models import Models
from tightrope.server.settings.settings import ServerSettings

pytestmark = pytest.mark.quick

REQUEST = GenerateRequest("r", TextPrompt(()), stop=StopRules(max_tokens=20))


def delta(reason: FinishReason | None = None, index: int = 0) -> Delta:
    finish = None if reason is None else Finish(reason, 5, Timings(0.5, 1.5, 4.0))
    return Delta("r", index, "x", (), PromptInfo(12, 8, 1), finish)


class ScriptedClient:
    """Answers every request with the same deltas, then raises `error` if there is one."""

    info = None
    is_healthy = True
    restarts = private_bytes = 0

    def __init__(self, *deltas: Delta, error: EngineError | None = None, stats: Stats | None = None) -> None:
        self._deltas = deltas
        self._error = error
        self.stats = stats or Stats()
        self.num_running, self.num_waiting = self.stats.num_running, self.stats.num_waiting

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        for item in self._deltas:
            yield item
        if self._error is not None:
            raise self._error


def metrics_of(client: ScriptedClient) -> Metrics:
    """Those of a server whose only model is loaded."""
    models = Models.alone(client, ServerSettings(), no_other)
    models.current.state = "loaded"
    return Metrics(models)


def values(metrics: Metrics) -> dict[str, float]:
    """All samples, named as Prometheus writes them."""
    return parse(metrics.render().decode())


def parse(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_a_whole_answer_is_a_success_with_its_lengths_and_times():
    client = ScriptedClient(delta(), delta("eos"))
    metrics = metrics_of(client)
    [_ async for _ in metrics.generate(client, REQUEST)]

    found = values(metrics)

    assert (found["tgi_request_count"], found["tgi_request_success"]) == (1, 1)
    assert found["tgi_request_generated_tokens_sum"] == 5
    assert found["tgi_request_max_new_tokens_sum"] == 20
    assert found["tgi_request_queue_duration_sum"] == 0.5
    assert found["tgi_request_inference_duration_sum"] == 5.5
    assert found["tgi_request_mean_time_per_token_duration_sum"] == 1.0  # 4 s for the 4 tokens behind the first
    assert found["tgi_request_duration_count"] == 1


@pytest.mark.parametrize(
    ("error", "label"),
    [
        (InvalidRequest("x"), "validation"),
        (TemplateFailed("x"), "template"),
        (Overloaded("x"), "overloaded"),
        (EngineUnavailable("x"), "generation"),
    ],
)
async def test_a_refused_request_is_one_failure_although_it_is_reported_twice(error: EngineError, label: str):
    client = ScriptedClient(error=error)
    metrics = metrics_of(client)
    with pytest.raises(type(error)):
        [_ async for _ in metrics.generate(client, REQUEST)]
    metrics.refused(error)  # the handler that writes the reply sees the same error

    found = values(metrics)

    assert (found["tgi_request_count"], found["tgi_request_success"]) == (1, 0)
    assert found[f"tgi_request_failure{{err={label}}}"] == 1


async def test_a_request_that_never_reached_the_engine_is_counted_too():
    client = ScriptedClient()
    metrics = metrics_of(client)
    metrics.refused(InvalidRequest("temperature", "temperature"))

    found = values(metrics)

    assert (found["tgi_request_count"], found["tgi_request_failure{err=validation}"]) == (1, 1)


async def test_a_client_that_hangs_up_is_dropped():
    client = ScriptedClient(delta(), delta(), delta("eos"))
    metrics = metrics_of(client)
    stream = metrics.generate(client, REQUEST)
    await anext(stream)
    await stream.aclose()

    found = values(metrics)

    assert found["tgi_request_failure{err=dropped}"] == 1
    assert found["tgi_request_success"] == 0


async def test_a_choice_that_fails_makes_its_request_a_failure():
    client = ScriptedClient(delta("error"))
    metrics = metrics_of(client)
    [_ async for _ in metrics.generate(client, REQUEST)]

    found = values(metrics)

    assert (found["tgi_request_failure{err=generation}"], found["tgi_request_success"]) == (1, 0)


async def test_the_gauges_show_the_engines_latest_numbers():
    stats = Stats(
        num_running=2, num_waiting=3, cache_used=100, cache_reusable=40, cache_capacity=200, steps=7, step_s=1.5
    )

    found = values(metrics_of(ScriptedClient(stats=stats)))

    assert (found["tgi_batch_current_size"], found["tgi_queue_size"]) == (2, 3)
    assert [found[f"tightrope_cache_tokens{{state={s}}}"] for s in ("used", "reusable", "free")] == [100, 40, 60]
    assert (found["tgi_batch_inference_duration_count"], found["tgi_batch_inference_duration_sum"]) == (7, 1.5)


NAMES_OF_TGI = """
    tgi_request_count tgi_request_success tgi_batch_inference_count tgi_batch_inference_success tgi_queue_size
    tgi_batch_current_size tgi_batch_current_max_tokens tgi_batch_total_tokens tgi_request_duration_count
    tgi_request_queue_duration_count tgi_request_inference_duration_count tgi_request_generated_tokens_count
    tgi_request_mean_time_per_token_duration_count tgi_request_input_length_count tgi_request_max_new_tokens_count
    tgi_batch_inference_duration_count tgi_batch_forward_duration_count tgi_batch_decode_duration_count
"""


def test_the_names_that_users_of_tgi_chart_are_there():
    assert set(NAMES_OF_TGI.split()) <= values(metrics_of(ScriptedClient())).keys()


async def test_two_apps_count_apart():
    client = ScriptedClient(delta("eos"))
    one, other = metrics_of(client), metrics_of(ScriptedClient())
    [_ async for _ in one.generate(client, REQUEST)]

    assert values(other)["tgi_request_count"] == 0


@pytest.mark.plain
def test_the_real_server_counts_a_request_and_what_it_found_in_the_cache(server: RunningServer):
    def counts() -> dict[str, float]:
        return parse(httpx.get(f"{server.url}/metrics", timeout=60).text)

    before = counts()
    for _ in range(2):
        body = {"prompt": "One two three four five", "max_tokens": 1}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    after = counts()

    assert after["tgi_request_success"] - before["tgi_request_success"] == 2
    assert after["tightrope_reused_tokens_total"] > before["tightrope_reused_tokens_total"]
