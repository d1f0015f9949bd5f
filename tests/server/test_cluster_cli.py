"""What `tightrope cluster` says where it can't serve, and what it scales by; none of this starts Ray."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkout import ROOT
from real_server import clean_environment

from tightrope.server.cluster.arguments import settings_of
from tightrope.server.cluster.load import FULL_TOKENS, load_of, wanted_replicas
from tightrope.server.settings.settings import SettingsError, load_settings


def command(*arguments: str, before: str = "pass") -> tuple[int, str]:
    """Its status, and what it said on standard error. before: Python that runs first in its process."""
    script = f"import sys; {before}; from tightrope.server.cli.main import main; sys.exit(main({list(arguments)!r}))"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=clean_environment(), cwd=ROOT, check=False
    )
    return told.returncode, told.stderr


def test_without_ray_one_line_names_the_extra():
    status, said = command("cluster", before="sys.modules['ray'] = None")
    assert status == 1
    assert said == "tightrope: tightrope cluster needs Ray Serve: pip install 'tightrope[cluster]'\n"


def test_a_port_in_use_is_told_before_ray_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = command("cluster", "--port", str(port))
    assert status == 1
    assert said.splitlines()[-1].startswith(f"tightrope: can't listen on 127.0.0.1 port {port}: address already in use")


def test_a_ray_that_can_not_be_started_is_told_in_one_line():
    late = "import ray; ray.init = lambda **options: exec('raise Exception(\"the node\\\\n timed out\")')"
    status, said = command("cluster", "--port", "0", before=late)
    assert (status, said) == (1, "tightrope: Ray can't be started on this machine: the node timed out\n")


def test_more_replicas_than_memory_holds_are_refused_in_one_line_before_ray_starts():
    late = "import sys; sys.modules['ray.serve'] = None"  # Whoever imports it is told of another reason.
    status, said = command("cluster", "--port", "0", "--replicas", "1000", before=late)
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("tightrope: --replicas: 1000 replicas don't fit here: each takes ")
    assert "ask for at most" in said or "free some memory" in said


def test_more_gpus_than_ray_finds_are_refused_in_one_line():
    found = "import ray; from ray import serve; ray.init = serve.start = lambda **options: None"
    found += "; ray.cluster_resources = lambda: {'GPU': 1.0}"
    status, said = command("cluster", "--port", "0", "--replicas", "2", "--replica-gpus", "0.75", before=found)
    assert (status, said.count("\n")) == (1, 1)
    assert "2 replicas with 0.75 GPUs each are more than the 1 that Ray finds on this machine" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "0"], "--replicas: input should be greater than or equal to 1"),
        (["--replicas", "5000"], "--replicas: input should be less than or equal to 1024"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas: it must not be less than the 3 replicas"),
        (["--replica-gpus", "17"], "--replica-gpus: input should be less than or equal to 16"),
    ],
)
def test_a_number_of_replicas_that_can_not_be_is_refused_in_one_line(arguments: list[str], said: str):
    status, told = command("cluster", *arguments)
    assert (status, told.count("\n")) == (2, 1)
    assert said in told.lower()


def test_several_models_are_refused_in_one_line():
    status, said = command("cluster", "--models", "/tmp")
    assert (status, said.count("\n")) == (2, 1)
    assert "--models" in said


@pytest.mark.quick
@pytest.mark.parametrize("option", ["models", "models-max", "sleep-idle-seconds"])
def test_what_only_a_server_of_several_models_does_is_refused_wherever_it_is_set(option: str):
    variable = "TIGHTROPE_" + option.replace("-", "_").upper()
    with pytest.raises(SettingsError, match=f"^{option}: "):
        settings_of({}, {variable: "3"})


@pytest.mark.quick
def test_replicas_come_from_the_file_the_environment_and_the_command_line_alike(tmp_path: Path):
    file = tmp_path / "x.toml"
    file.write_text("replicas = 3\nmax-replicas = 5\n")
    assert load_settings({"config": str(file)}, {}).cluster.max_replicas == 5
    assert load_settings({"config": str(file)}, {"TIGHTROPE_REPLICAS": "4"}).cluster.replicas == 4
    assert load_settings({"replicas": "2"}, {"TIGHTROPE_REPLICAS": "4"}).cluster.replicas == 2
    with pytest.raises(SettingsError, match="TIGHTROPE_MAX_REPLICAS"):
        load_settings({}, {"TIGHTROPE_MAX_REPLICAS": "1"})


@pytest.mark.quick
def test_a_replica_is_full_by_answers_or_by_prompts_that_wait():
    assert load_of(0, 16, 0) == 0
    assert load_of(16, 16, 0) == 1
    assert load_of(1, 16, 8 * FULL_TOKENS) == 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("loads", "wanted"),
    [({}, 2), ({"a": 0.1, "b": 0.2}, 1), ({"a": 1.0, "b": 1.0}, 2), ({"a": 1.5, "b": 1.1}, 3), ({"a": 90.0}, 4)],
    ids=["nothing known", "idle", "full", "more than full", "more than may be"],
)
def test_as_many_replicas_are_wanted_as_their_loads_make_full_ones(loads: dict[str, float], wanted: int):
    context = SimpleNamespace(
        aggregated_metrics={"load": loads},
        target_num_replicas=2,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
    )
    assert wanted_replicas(context) == (wanted, {})
