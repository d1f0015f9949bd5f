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
        body = {
            "messages": [{"role": "user", "content": "Hello?"}],
            "max_tokens": 8,
            "ignore_eos": True,
            "model": "any",
        }
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


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"replica": 2}, "replica: no such setting; did you mean replicas, "),
        ({"max_model_length": 2}, "max-model-length: no such setting; did you mean max-model-len"),
        ({"num-shard": 2}, "num-shard: no such setting; did you mean tensor-parallel?"),
        ({"-c": 2}, "-c: no such setting; did you mean max-model-len?"),
        ({"zzzzzz": 2}, "zzzzzz: no such setting"),
        ({1: 2}, "1: no such setting"),
        ({"max-model-len": 1, "max_model_len": 2}, "max-model-len: it is there twice"),
        ({"port": "x"}, "port: input should be a valid integer, not 'x'"),
        ({"port": 65536}, "port: input should be less than or equal to 65535, not '65536'"),
        ({"replicas": 0}, "replicas: input should be greater than or equal to 1, not '0'"),
        ({"replicas": 2.5}, "replicas: input should be a valid integer"),
        ({"replicas": True}, "replicas: input should be a valid integer"),
        ({"replicas": 3, "max-replicas": 2}, "max-replicas: it must not be less than the 3 replicas"),
        ({"session-dir": None}, "session-dir: no value is given"),
        ({"lora": {"a": ["/x"]}}, "lora: a value should be a text, a number, true or false, or a list"),
        ({"kv-cache-dtype": "fp8_e5m2"}, "kv-cache-dtype: keys and values in 8 bits are --kv-cache q8"),
        ({"models": "/models"}, "models: a cluster serves one model"),
        ({"sleep-idle-seconds": 60}, "sleep-idle-seconds: a cluster never unloads its model"),
        ({"config": "/no/such.toml"}, "/no/such.toml: can't read the configuration: No such file"),
    ],
)
def test_an_argument_that_can_not_be_used_is_named_in_one_line(arguments: dict[object, object], line: str):
    with pytest.raises(SettingsError) as refused:
        settings_of(arguments, {})
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


@pytest.mark.quick
def test_arguments_may_have_the_types_and_names_of_a_file():
    arguments = {
        "max_model_len": 4096,
        "any-model-name": True,
        "scale-up-seconds": 1.5,
        "allowed-hosts": ["a.example", "b.example"],
        "chat-template-arg": {"length": "medium"},
    }
    settings = settings_of(arguments, {"TIGHTROPE_MAX_MODEL_LEN": "1024"})
    assert settings.engine.model.max_model_len == 4096
    assert (settings.any_model_name, settings.cluster.scale_up_s) == (True, 1.5)
    assert settings.allowed_hosts == ("a.example", "b.example")
    assert settings.chat_template_args == {"length": "medium"}


def test_the_configuration_for_a_cluster_is_taken_by_our_own_settings():
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text("utf-8"))
    assert config["proxy_location"] == "Disabled"
    (application,) = config["applications"]
    assert application["import_path"] == "tightrope.server.cluster.application:build"
    settings = settings_of(application["args"])
    assert (settings.cluster.replicas, settings.cluster.max_replicas, settings.host) == (2, 8, "0.0.0.0")
