"""What deploy/ starts: our own command line takes every option and variable, and no container may do more."""

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import DEPLOY, FILES, Container, containers, documents, pods, serve_configs
from dockerfile import environment, stages

from tightrope.server.cli.commands import run
from tightrope.server.cli.serve import DRAIN_S
from tightrope.server.cluster.arguments import settings_of as settings_of_arguments
from tightrope.server.http.guards import OPEN_ROUTES
from tightrope.server.http.listening import CLOSE_S
from tightrope.server.settings.settings import ServerSettings, SettingsError

pytestmark = pytest.mark.quick

ALL = list(containers())
SERVERS = [container for container in ALL if container.command is None and "ray.yaml" not in container.name]
RAYS = [container for container in ALL if container not in SERVERS]
CONFIGS = list(serve_configs())
KEY = "example-key"


def by_name(container: Container) -> str:
    return container.name


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The file of keys, filled in as its example says."""
    path = tmp_path / "tightrope.toml"
    path.write_text((DEPLOY / "tightrope.toml.example").read_text("utf-8").replace("change me", KEY))
    return path


def settings_of(container: Container, keys: Path, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """What `tightrope serve` makes of a container's words and variables, and of the image's."""
    image = environment(stages("cpu")[-1], "cpu")
    found = {**image, **container.environment}
    if "TIGHTROPE_CONFIG" in found:
        assert container.mounts.get(found["TIGHTROPE_CONFIG"]) or container.mounts.get(
            str(Path(found["TIGHTROPE_CONFIG"]).parent)
        )
        found["TIGHTROPE_CONFIG"] = str(keys)
    for name in os.environ:
        if name.startswith("TIGHTROPE_"):
            monkeypatch.delenv(name)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    served: list[ServerSettings] = []
    monkeypatch.setattr("tightrope.server.cli.serve.serve", lambda settings, notes: served.append(settings) or 0)
    assert run(["serve", *container.arguments]) == 0
    return served[0]


def is_writable(container: Container, folder: str) -> bool:
    """Whether a folder lies in a volume."""
    return any(str(parent) in container.mounts for parent in Path(folder).parents)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_yaml_of_its_kind(path: Path):
    for document in documents(path):
        if "services" in document:
            assert document["name"].startswith("tightrope")
        elif "applications" not in document:
            assert document["apiVersion"]
            assert document["kind"]
            assert document["metadata"]["name"].startswith("tightrope")


def test_there_is_one_server_and_a_ray_cluster_for_either():
    assert {container.name.split()[0] for container in SERVERS} == {"compose.yaml", "compose.cuda.yaml", "replica.yaml"}
    assert {container.name.split()[0] for container in RAYS} == {"compose.ray.yaml", "ray.yaml"}


@pytest.mark.parametrize("container", SERVERS, ids=by_name)
def test_our_command_line_takes_all_words_and_variables_of_a_server(
    container: Container, keys: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = settings_of(container, keys, monkeypatch)

    assert settings.api_key == KEY, "the key comes from the file"
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert is_writable(container, str(settings.engine.model.cache.session_dir))
    assert is_writable(container, container.environment.get("HF_HOME", "/data") + "/hub")


@pytest.mark.parametrize("container", SERVERS, ids=by_name)
def test_a_variable_that_is_none_would_be_found(container: Container, keys: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIGHTROPE_NO_SUCH", "1")
    wrong = {**container.environment, "TIGHTROPE_NO_SUCH": "1"}
    image = environment(stages("cpu")[-1], "cpu")
    for name, value in {**image, **wrong, "TIGHTROPE_CONFIG": str(keys)}.items():
        monkeypatch.setenv(name, value)

    assert run(["serve", *container.arguments]) == 2


@pytest.mark.parametrize("container", ALL, ids=by_name)
def test_no_container_is_root_or_can_become_it_or_write_beside_its_volumes(container: Container):
    assert not container.is_root
    assert not container.can_write_root
    assert not container.can_gain
    assert "/tmp" in container.mounts
    assert container.memory is not None


@pytest.mark.parametrize("container", ALL, ids=by_name)
def test_no_key_stands_in_a_file_that_is_committed(container: Container):
    assert not [name for name in container.environment if name.endswith("KEY")]
    assert not [word for word in container.arguments if "key" in word]


@pytest.mark.parametrize("container", SERVERS, ids=by_name)
def test_answers_may_go_on_while_a_container_ends(container: Container):
    assert container.grace_s >= DRAIN_S + CLOSE_S


def test_the_user_is_the_images_own():
    user = pods(next(d for d in documents(DEPLOY / "kubernetes/replica.yaml") if d["kind"] == "Deployment"))
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["tightrope"]["user"]

    (run_line,) = [line for line in stages("cpu")[-1].all("RUN") if "useradd" in line]
    assert f"--uid {next(user)['securityContext']['runAsUser']} " in run_line
    assert f"--uid {compose.split(':')[0]} " in run_line
    assert "/chats" in run_line, "docker makes a new volume as the image has its folder: this user's own"


def test_probes_ask_routes_that_need_no_key():
    for path in FILES:
        for pod in (pod for document in documents(path) for pod in pods(document)):
            for container in pod["containers"]:
                probes = [container[kind] for kind in container if kind.endswith("Probe")]
                assert probes
                assert {probe["httpGet"]["path"] for probe in probes if "httpGet" in probe} <= OPEN_ROUTES


# ---- Ray ----


def arguments_of(config: Mapping[str, Any], keys: Path) -> dict[str, Any]:
    """What our application is given, with the keys of a test in the place of the file that is mounted there."""
    (application,) = config["applications"]
    arguments: dict[str, Any] = application["args"]
    return arguments | ({"config": str(keys)} if "config" in arguments else {})


def variables_of(where: str) -> dict[str, str]:
    """What the application finds in its environment: the image's, and those of the Ray containers of its file."""
    found = environment(stages("cpu")[-1], "cpu")
    for container in RAYS:
        found |= container.environment if container.name.startswith(f"{where} ") else {}
    return found


@pytest.mark.parametrize(("where", "config"), CONFIGS, ids=[where for where, _ in CONFIGS])
def test_our_settings_take_the_arguments_of_every_serve_configuration(
    where: str, config: Mapping[str, Any], keys: Path
):
    arguments = arguments_of(config, keys)

    settings = settings_of_arguments(arguments, variables_of(where))

    assert config["proxy_location"] == "Disabled"
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert settings.api_key == (KEY if "config" in arguments else None)


@pytest.mark.parametrize(("where", "config"), CONFIGS, ids=[where for where, _ in CONFIGS])
def test_an_argument_that_is_none_would_be_found(where: str, config: Mapping[str, Any], keys: Path):
    arguments = arguments_of(config, keys)

    with pytest.raises(SettingsError, match=r"^replica: no such setting; did you mean "):
        settings_of_arguments({**arguments, "replica": 2}, variables_of(where))
    with pytest.raises(SettingsError, match=r"^TIGHTROPE_NO_SUCH: no such setting"):
        settings_of_arguments(arguments, {**variables_of(where), "TIGHTROPE_NO_SUCH": "1"})


def test_every_serve_configuration_starts_the_same_application():
    assert len(CONFIGS) == 3
    assert len({config["applications"][0]["import_path"] for _, config in CONFIGS}) == 1


def in_another_process(script: str, *words: str) -> str:
    """What a script prints; Ray's import warns of its own use of pydantic, which would be an error here."""
    command = [sys.executable, "-W", "ignore", "-c", script, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@pytest.mark.plain
def test_the_application_is_there():
    module, _, name = CONFIGS[0][1]["applications"][0]["import_path"].partition(":")

    assert in_another_process(f"import {module} as found; print(callable(found.{name}))") == "True"


@pytest.mark.plain
@pytest.mark.parametrize("container", [c for c in RAYS if c.command], ids=by_name)
def test_rays_own_command_line_takes_the_words_of_its_containers(container: Container):
    assert container.command is not None
    module = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}[Path(container.command[0]).name]
    words = [str(DEPLOY / "ray/serve.yaml") if word == "/serve.yaml" else word for word in container.arguments]
    script = f"import sys; from {module} import cli; cli.commands[sys.argv[1]].make_context('', sys.argv[2:])"

    in_another_process(script, *words)  # It fails at a word that isn't known.


@pytest.mark.plain
def test_the_ray_of_the_manifest_is_the_one_that_is_installed():
    (service,) = [d for d in documents(DEPLOY / "kubernetes/ray.yaml") if d["kind"] == "RayService"]

    assert service["spec"]["rayClusterConfig"]["rayVersion"].split(".")[:2] == version("ray").split(".")[:2]


def test_the_ports_of_ray_are_open_to_the_cluster_alone():
    compose = yaml.safe_load((DEPLOY / "compose.ray.yaml").read_text("utf-8"))
    policy = next(d for d in documents(DEPLOY / "kubernetes/ray.yaml") if d["kind"] == "NetworkPolicy")

    published = [port for service in compose["services"].values() for port in service.get("ports", ())]
    open_to_all = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert published == ["127.0.0.1:8080:8080"]
    assert compose["networks"]["cluster"] == {"internal": True}
    assert open_to_all == [[{"port": "http"}]]
