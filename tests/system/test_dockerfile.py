"""The Dockerfile can't be built in a test, but it can be read, stage by stage, and what it starts can be started."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from checkout import ROOT
from dockerfile import DEVICES, Stage, chain, command, defaults, environment, packages, stages, used
from real_server import RunningServer, started

from tightrope.server.settings.settings import load_settings

pytestmark = pytest.mark.quick

HOME = "/opt/tightrope"  # The image keeps the installation there.
DATA = "/data"  # TGI's image has its volume there, too.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / ".ci/constraints.txt").read_text("utf-8"), re.MULTILINE))


def image(device: str) -> Stage:
    return stages(device)[-1]


def named(name: str, device: str) -> Stage:
    return next(stage for stage in stages(device) if stage.name == name)


def local_sources() -> list[str]:
    """Everything that is copied from the checkout."""
    copies = [arguments.split() for stage in stages("cpu") for arguments in stage.all("COPY")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out; the last line that matches decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        if fnmatch(path, pattern) or path.split("/")[0] == pattern:
            ignored = not line.startswith("!")
    return ignored


# ---- the build ----


@pytest.mark.parametrize("source", local_sources())
def test_what_is_copied_exists_and_is_sent_to_the_builder(source: str):
    assert (ROOT / source).exists()
    assert not is_ignored(source)


def test_every_package_of_the_project_is_copied():
    packages = PROJECT["tool"]["setuptools"]["package-dir"].values()

    assert {source.split("/")[0] for source in local_sources()} >= set(packages)


def test_the_cpu_is_the_default_device():
    assert defaults() == {"DEVICE": "cpu"}


@pytest.mark.parametrize("device", DEVICES)
def test_stages_are_defined_before_they_are_used(device: str):
    defined: set[str] = set()
    for stage in stages(device):
        assert stage.base in defined or re.fullmatch(r"(ubuntu|nvidia/cuda):\S+", stage.base)
        for words in map(str.split, stage.all("COPY")):
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in defined
                assert words[1] == words[2], "an environment can't be moved"
        defined.add(stage.name)


def test_every_stage_is_of_use_to_one_device_or_the_other():
    both = [{stage.name for stage in used(device)} for device in DEVICES]

    assert both[0] | both[1] == {stage.name for stage in stages("cpu")}
    assert not any("cuda" in name for name in both[0])
    assert not any("cpu" in name for name in both[1])


@pytest.mark.parametrize("device", DEVICES)
def test_the_variables_that_an_instruction_names_are_set_in_its_stage(device: str):
    for stage in used(device):
        known = environment(stage, device)
        texts = [arguments for name, arguments in stage.instructions if name not in ("HEALTHCHECK", "ENTRYPOINT")]
        for name in re.findall(r"\$\{?(\w+)", " ".join(texts)):
            assert known.get(name), name


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_built_runs_on_the_system_that_it_was_built_on(device: str):
    bases = [chain(stage, device)[0].base for stage in (named("build", device), image(device))]

    assert len({re.sub("-(devel|runtime)-", "-", base) for base in bases}) == 1
    assert all("ubuntu24.04" in base.replace(":", "") for base in bases)
    for run in [run for stage in used(device) for run in stage.all("RUN")]:
        assert set(re.findall(r"python3\.\d+", run)) <= {"python3.12"}, "Ubuntu 24.04 has this one alone"


def test_each_device_has_its_own_build_of_torch():
    index = {device: environment(named("build", device), device)["PIP_EXTRA_INDEX_URL"] for device in DEVICES}
    toolkit = re.findall(r"cuda:(\d+)\.(\d+)\.", named("build-cuda", "cuda").base)

    assert index["cpu"].endswith("/whl/cpu")
    assert index["cuda"].endswith("/whl/cu" + "".join(toolkit[0]))
    assert {"torch", "triton"} <= CONSTRAINTS.keys()


@pytest.mark.parametrize(("device", "wanted"), [("cpu", {"demo", "cluster"}), ("cuda", {"demo", "exl2", "cluster"})])
def test_the_extras_that_are_installed_exist(device: str, wanted: set[str]):
    extras = environment(named("build", device), device)["EXTRAS"].split(",")

    assert any('".[${EXTRAS}]"' in run for run in named("build", device).all("RUN"))
    assert set(extras) == wanted <= PROJECT["project"]["optional-dependencies"].keys()


def test_kernels_are_built_for_the_cards_of_three_generations():
    llama = environment(named("build", "cuda"), "cuda")["CMAKE_ARGS"]
    exllama = re.findall(r'TORCH_CUDA_ARCH_LIST="([^"]*)"', " ".join(named("installed-cuda", "cuda").all("RUN")))

    assert "-DGGML_CUDA=ON" in llama
    assert re.findall(r"CMAKE_CUDA_ARCHITECTURES=(\S+)", llama) == ["86;89;90"]
    assert [arches.replace(".", "") for arches in exllama] == ["86;89;90"]
    assert "CUDA" not in environment(named("build", "cpu"), "cpu")["CMAKE_ARGS"]


def test_exllamav2s_kernels_are_where_they_are_looked_for():
    run = " ".join(named("installed-cuda", "cuda").all("RUN"))
    (name,) = re.findall(r"/(\w+)\.so \.venv/lib/python3\.12/site-packages/", run)

    assert f'find_spec("{name}")' in (ROOT / "kernels/exllama.py").read_text("utf-8")


def test_the_image_for_cards_can_compile_what_starts_its_kernels():
    assert {"gcc", "libc6-dev", "python3-dev"} <= packages(image("cuda"), "cuda")
    assert {"g++", "make", "python3-dev", "python3-venv"} <= packages(named("build", "cuda"), "cuda")
    assert not {"gcc", "python3-dev"} & packages(image("cpu"), "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_has_the_libraries_that_the_engines_need(device: str):
    assert {"python3", "libgomp1", "ca-certificates"} <= packages(image(device), device)


@pytest.mark.plain
def test_the_targets_of_make_exist():
    targets = re.findall(r"make (\w+)$", "\n".join(named("build", "cpu").all("RUN")), re.MULTILINE)

    assert targets == ["llama"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


# ---- the image ----


def image_environment(device: str, folder: str = DATA) -> dict[str, str]:
    """As docker gives it to the start line, with a folder for the volume. Docker itself sets HOSTNAME."""
    found = {name: value.replace(DATA, folder) for name, value in environment(image(device), device).items()}
    return {"PATH": os.environ["PATH"], "HOSTNAME": "3f2a8c1b9d0e"} | found


@pytest.mark.parametrize("device", DEVICES)
def test_models_and_compiled_kernels_are_kept_in_the_volume(device: str):
    found = environment(image(device), device)

    assert image(device).all("VOLUME") == [found["HF_HOME"]] == [DATA]
    assert found["TRITON_CACHE_DIR"].startswith(f"{found['HOME']}/")
    assert found["HOME"].startswith(f"{DATA}/")


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_listens_on_its_port_on_all_addresses_unless_it_is_told_otherwise(device: str):
    found = image_environment(device)
    settings = load_settings({}, found)
    told = load_settings({}, found | {"PORT": "3000", "HOSTNAME": "::", "API_KEY": "hunter2"})

    assert (settings.host, settings.port, settings.api_key) == ("0.0.0.0", 80, None)
    assert image(device).all("EXPOSE") == ["80"]
    assert (told.host, told.port, told.api_key) == ("::", 3000, "hunter2")
    assert load_settings({}, found | {"TIGHTROPE_PORT": "9000"}).port == 9000


def test_the_start_is_a_script_that_is_copied_and_may_be_run():
    (start,) = command(image("cpu").all("ENTRYPOINT")[0])
    copied = [words for words in map(str.split, image("cpu").all("COPY")) if not words[0].startswith("--from")]

    assert copied == [[Path(start).name, f"{HOME}/"]]
    assert Path(start).parent == Path(HOME)
    assert (ROOT / Path(start).name).stat().st_mode & stat.S_IXUSR
    assert "tightrope" in PROJECT["project"]["scripts"]


def test_the_user_that_the_start_serves_as_is_the_images_own():
    (uid,) = re.findall(r"useradd --uid (\d+) ", " ".join(image("cpu").all("RUN")))

    assert f"owner={uid}:{uid}" in (ROOT / "docker-entrypoint.sh").read_text("utf-8")


SHOWN = """#!/bin/sh
echo "$(id -u):$(id -g) $HOME $TRITON_CACHE_DIR $*"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users may enter, which pytest's own are not."""
    with TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "data").mkdir()
        yield path


def lay_out(folder: Path, program: str) -> Path:
    """The image's /opt/tightrope in a folder, with another program in its environment; returns its start."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/tightrope").write_text(program)
    (folder / ".venv/bin/tightrope").chmod(0o755)
    start = folder / "docker-entrypoint.sh"
    start.write_bytes((ROOT / start.name).read_bytes())
    start.chmod(0o755)
    return start


def run_start(folder: Path, *arguments: str, without: str = "", data: str = "data") -> str:
    """What the start runs in place of the server, and as whom. without: capabilities that its root doesn't have."""
    start = lay_out(folder, SHOWN)
    found = image_environment("cuda", str(folder / data))
    bounded = ["setpriv", f"--bounding-set={without}", "--"] if without and os.getuid() == 0 else []
    return subprocess.run([*bounded, start, *arguments], env=found, capture_output=True, text=True, check=True).stdout


@pytest.mark.plain
def test_the_server_runs_without_privileges_and_gets_what_is_roots_in_the_volume(folder: Path):
    (folder / "data/hub").mkdir()

    shown = run_start(folder, "--model-id", "ORG/NAME")

    user = "10001:10001" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
    home = folder / "data/tightrope"
    assert shown == f"{user} {home} {home}/triton serve --model-id ORG/NAME\n"
    owners = {f"{path.stat().st_uid}:{path.stat().st_gid}" for path in (folder / "data").rglob("*")}
    assert owners == {user}


@pytest.mark.plain
def test_the_server_runs_as_the_owner_of_the_volume(folder: Path):
    owner = 12345 if os.getuid() == 0 else os.getuid()
    os.chown(folder / "data", owner, -1)

    assert run_start(folder).startswith(f"{owner}:")


@pytest.mark.plain
@pytest.mark.parametrize(
    ("without", "user"), [("-all", 0), ("-setuid,-setgid", 0), ("-net_bind_service", 10001), ("-chown", 10001)]
)
def test_a_container_that_takes_capabilities_away_serves_all_the_same(folder: Path, without: str, user: int):
    shown = run_start(folder, without=without)

    assert shown.startswith(f"{user if os.getuid() == 0 else os.getuid()}:")


@pytest.mark.plain
def test_a_folder_for_models_that_is_not_there_is_made(folder: Path):
    user = 10001 if os.getuid() == 0 else os.getuid()

    assert run_start(folder, data="data/models").startswith(f"{user}:")
    assert (folder / "data/models").stat().st_uid == user


@pytest.mark.plain
def test_a_clusters_service_called_as_the_image_leaves_it_its_port(folder: Path):
    start = lay_out(folder, "#!/bin/sh\necho $TIGHTROPE_PORT\n")
    found = image_environment("cpu", str(folder / "data"))
    for value, port in (("tcp://10.0.0.3:8000", found["TIGHTROPE_PORT"]), ("9000", "9000")):
        environment = found | {"TIGHTROPE_PORT": value}
        shown = subprocess.run([start], env=environment, capture_output=True, text=True, check=True).stdout
        assert shown == f"{port}\n"


@pytest.mark.plain
def test_a_volume_that_can_not_be_written_keeps_nothing(folder: Path):
    (folder / "data/tightrope").write_text("no folder can be made here")

    assert " /tmp/tightrope /tmp/tightrope/triton serve" in run_start(folder)


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    """The image's own start line with TGI's words, in its own environment, on the package that is installed here.

    `id` tells of a user without privileges, as under `docker run --user`: another one could not read this checkout.
    """
    with TemporaryDirectory() as name:
        start = lay_out(Path(name), f'#!/bin/sh\nexec "{sys.executable}" -m tightrope "$@"\n')
        (Path(name) / "data").mkdir()
        (Path(name) / "id").write_text("#!/bin/sh\necho 1000\n")
        (Path(name) / "id").chmod(0o755)
        found = image_environment("cpu", f"{name}/data")
        given = {
            "PORT": "0",
            "MAX_INPUT_LENGTH": "100",
            "MAX_BATCH_PREFILL_TOKENS": "64",
            "NUM_SHARD": "1",
            "API_KEY": "k",
        }
        words = ["--max-total-tokens", "256", "--trust-remote-code", "--max-concurrent-requests=2", "--json-output"]
        with started([str(start), *words], found | given | {"PATH": f"{name}:{found['PATH']}"}) as server:
            yield server


@pytest.mark.plain
def test_the_start_line_serves_the_bundled_model_under_tgis_words(served: RunningServer):
    with httpx.Client(base_url=served.url, headers={"authorization": "Bearer k"}, timeout=60) as client:
        body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 4}}
        assert client.post("/generate", json=body).json().keys() == {"generated_text"}
        info = client.get("/info").json()
        assert (info["max_total_tokens"], info["max_input_length"], info["max_concurrent_requests"]) == (256, 100, 18)
        long = client.post("/generate", json={"inputs": "word " * 120, "parameters": {"max_new_tokens": 1}})
        assert long.status_code == 422
        assert "`inputs` must have less than 100 tokens. Given: 12" in long.json()["error"]
    assert httpx.post(f"{served.url}/generate", json=body, timeout=60).status_code == 401


@pytest.mark.plain
def test_the_start_says_which_of_tgis_words_change_nothing(served: RunningServer):
    assert "note      --trust-remote-code changes nothing: no code of a model is ever run" in served.output
    assert "note      --json-output changes nothing: " in served.output
    assert "NUM_SHARD" not in served.output


@pytest.mark.plain
@pytest.mark.parametrize("variable", ["PORT", "TIGHTROPE_PORT"])
def test_the_health_check_asks_the_port_that_is_served(served: RunningServer, variable: str):
    program, flags, code = command(image("cpu").all("HEALTHCHECK")[0])
    asked = image_environment("cpu") | {variable: str(httpx.URL(served.url).port)}

    assert (program, flags) == (f"{HOME}/.venv/bin/python", "-Ic")
    subprocess.run([sys.executable, flags, code], env=asked, check=True)
    assert subprocess.run([sys.executable, flags, code], env=asked | {"PORT": "1"}, capture_output=True).returncode == 1
