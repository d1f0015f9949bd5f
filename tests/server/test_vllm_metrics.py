"""What /metrics tells in vLLM's words."""

import time
from collections.abc import Mapping

import httpx
import pytest
from one_model import no_other
from prometheus_client.parser import text_string_to_metric_families
from real_server import RunningServer
from test_metrics import REQUEST, ScriptedClient, delta, parse, values

from tightrope.engine.types import FinishReason, ModelInfo, Stats
from tightrope.server.http.metrics import Metrics
from tightrope.server.models.models import Models
from tightrope.server.settings.settings import ServerSettings

pytestmark = pytest.mark.quick

INFO = ModelInfo("org/model", "llama", "gguf", 259, 64, 64, 200, "f16", 4, None, None, (), None, ())
OF_MODEL = "{engine=0,model_name=org/model}"

TYPES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:gpu_cache_usage_perc": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:gpu_prefix_cache_queries": "counter",
    "vllm:gpu_prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:lora_requests_info": "gauge",
}


class LoadedClient(ScriptedClient):
    """One whose model is known, with adapters."""

    info = INFO
    adapters: Mapping[str, str] = {"poet": "/adapters/poet", "clerk": "/adapters/clerk"}


def metrics_of(client: LoadedClient) -> Metrics:
    models = Models.alone(client, ServerSettings(), no_other)
    models.current.state = "loaded"
    return Metrics(models)


async def test_every_name_has_vllms_type():
    client = LoadedClient(delta("eos"))
    metrics = metrics_of(client)
    [_ async for _ in metrics.generate(client, REQUEST)]

    families = text_string_to_metric_families(metrics.render().decode())
    found = {family.name: family.type for family in families if family.samples}

    assert {name: found.get(name) for name in TYPES} == TYPES


def test_gauges_and_counters_are_the_engines_numbers():
    stats = Stats(
        num_running=2,
        num_waiting=3,
        cache_used=50,
        cache_reusable=100,
        cache_capacity=200,
        prompt_tokens=1000,
        cached_tokens=600,
        generated_tokens=70,
        preemptions=1,
    )

    found = values(metrics_of(LoadedClient(stats=stats)))

    assert found[f"vllm:num_requests_running{OF_MODEL}"] == 2
    assert found[f"vllm:num_requests_waiting{OF_MODEL}"] == 3
    assert found[f"vllm:kv_cache_usage_perc{OF_MODEL}"] == found[f"vllm:gpu_cache_usage_perc{OF_MODEL}"] == 0.25
    assert found[f"vllm:prompt_tokens_total{OF_MODEL}"] == found[f"vllm:prefix_cache_queries_total{OF_MODEL}"] == 1000
    assert found[f"vllm:prefix_cache_hits_total{OF_MODEL}"] == 600
    assert found[f"vllm:gpu_prefix_cache_hits_total{OF_MODEL}"] == 600
    assert found[f"vllm:generation_tokens_total{OF_MODEL}"] == 70
    assert found[f"vllm:num_preemptions_total{OF_MODEL}"] == 1


async def test_times_and_lengths_are_those_of_the_answer():
    client = LoadedClient(delta(), delta("length"))
    metrics = metrics_of(client)
    began = time.perf_counter()
    [_ async for _ in metrics.generate(client, REQUEST)]
    took_s = time.perf_counter() - began

    found = values(metrics)

    assert found[f"vllm:time_to_first_token_seconds_sum{OF_MODEL}"] == 2.0  # 0.5 s of waiting and 1.5 s of prefill
    assert found[f"vllm:request_queue_time_seconds_sum{OF_MODEL}"] == 0.5
    assert found[f"vllm:request_prefill_time_seconds_sum{OF_MODEL}"] == 1.5
    assert found[f"vllm:request_decode_time_seconds_sum{OF_MODEL}"] == 4.0
    assert found[f"vllm:request_inference_time_seconds_sum{OF_MODEL}"] == 5.5
    assert found[f"vllm:request_time_per_output_token_seconds_sum{OF_MODEL}"] == 1.0  # 4 s for 4 tokens
    assert found[f"vllm:request_prompt_tokens_sum{OF_MODEL}"] == 12
    assert found[f"vllm:request_generation_tokens_sum{OF_MODEL}"] == 5
    assert 0 < found[f"vllm:e2e_request_latency_seconds_sum{OF_MODEL}"] <= took_s


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("eos", "stop"),
        ("stop_token", "stop"),
        ("stop_string", "stop"),
        ("length", "length"),
        ("error", "error"),
    ],
)
async def test_ends_have_vllms_words(reason: FinishReason, word: str):
    client = LoadedClient(delta(reason))
    metrics = metrics_of(client)
    [_ async for _ in metrics.generate(client, REQUEST)]

    name = f"vllm:request_success_total{{engine=0,finished_reason={word},model_name=org/model}}"
    assert values(metrics)[name] == 1


async def test_an_answer_whose_client_hung_up_was_aborted():
    client = LoadedClient(delta(), delta("eos"))
    metrics = metrics_of(client)
    stream = metrics.generate(client, REQUEST)
    await anext(stream)
    await stream.aclose()

    name = "vllm:request_success_total{engine=0,finished_reason=abort,model_name=org/model}"
    assert values(metrics)[name] == 1


def test_the_adapters_that_requests_may_name_are_listed_with_the_time():
    before = time.time()
    found = values(metrics_of(LoadedClient()))

    name = "vllm:lora_requests_info{max_lora=2,running_lora_adapters=clerk,poet,waiting_lora_adapters=}"
    assert before <= found[name] <= time.time()


def test_a_server_without_adapters_says_nothing_of_them():
    client = LoadedClient()
    client.adapters = {}

    assert not [name for name in values(metrics_of(client)) if "lora_requests_info" in name]


def test_a_model_that_is_still_loading_has_no_numbers_yet():
    client = LoadedClient()
    client.info = None  # type: ignore[assignment]

    assert not [name for name in values(metrics_of(client)) if name.startswith("vllm:")]


@pytest.mark.plain
def test_the_real_server_tells_a_router_what_it_found_in_its_cache(server: RunningServer):
    def counts() -> dict[str, float]:
        found = parse(httpx.get(f"{server.url}/metrics", timeout=60).text)
        return {name.partition("{")[0]: value for name, value in found.items() if name.startswith("vllm:")}

    body = {"prompt": "Six seven eight nine ten eleven", "max_tokens": 2, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    before = counts()
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    after = counts()

    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 2
    assert after["vllm:prefix_cache_hits_total"] > before["vllm:prefix_cache_hits_total"]
    assert after["vllm:time_to_first_token_seconds_count"] - before["vllm:time_to_first_token_seconds_count"] == 1
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
