"""The application that `serve deploy` runs: the front as a deployment, and options as its file has them."""

import socket
import sys

import httpx
import pytest
import yaml
from checkout import ROOT
from real_server import clean_environment, started

from tightrope.server.cluster.arguments import settings_of
from tightrope.server.settings.settings import SettingsError

DRIVER = """
import signal, sys
from tightrope.server.cluster.ray_variables import keep_ray_at_home
keep_ray_at_home()
import ray
from ray import serve
from tightrope.server.cluster.application import build
from tightrope.server.cluster.local import start_ray
start_ray(4)
serve.run(build({"replicas": 1, "threads": 1, "max-model-len": 1024, "kv-cache-tokens": 2048, "port": PORT,
                 "any-model-name": True, "api-key": "the key"}), name="tightrope", route_prefix=None)
print("http://127.0.0.1:PORT", flush=True)
print("try it", flush=True)
signal.sigwait({signal.SIGTERM})
serve.delete("tightrope")
ray.shutdown()
"""


@pytest.mark.slow
def test_the_front_serves_as_a_deployment_with_keys_and_metrics(free_port: int):
    driver = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})" + DRIVER.replace(
        "PORT", str(free_port)
    )
    with (
        started([sys.executable, "-c", driver], clean_environment()) as running,
        httpx.Client(base_url=running.url, timeout=120) as client,
    ):
        body = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 8, "model": "any"}
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        client.headers["Authorization"] = "Bearer the key"
        reply = client.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 8)
        assert "tightrope_replica_up{" in client.get("/metrics").text


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def test_an_option_that_is_none_is_named_in_one_line():
    with pytest.raises(SettingsError, match=r"^replica: no such setting$"):
        settings_of({"replica": 2})


def test_the_configuration_for_a_cluster_is_taken_by_our_own_settings():
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text("utf-8"))
    assert config["proxy_location"] == "Disabled"
    (application,) = config["applications"]
    assert application["import_path"] == "tightrope.server.cluster.application:build"
    settings = settings_of(application["args"])
    assert (settings.cluster.replicas, settings.cluster.max_replicas, settings.host) == (2, 8, "0.0.0.0")
