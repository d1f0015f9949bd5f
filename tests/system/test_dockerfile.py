"""The Dockerfile can't be built in a test, but what it copies and calls can be looked for."""

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
from checkout import ROOT

from tightrope.server.settings.settings import load_settings

pytestmark = pytest.mark.quick

HOME = "/opt/tightrope"  # where the image keeps the installation


def instructions() -> list[tuple[str, str]]:
    """All (name, arguments) with continued lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in pairs]


def arguments_of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def final_stage() -> list[tuple[str, str]]:
    every = instructions()
    start = max(i for i, (name, _) in enumerate(every) if name == "FROM")
    return every[start:]


def local_sources() -> list[str]:
    """Everything that is copied from the checkout."""
    copies = [arguments.split() for arguments in arguments_of("COPY")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out; the last line that matches decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        if fnmatch(path, pattern) or path.split("/")[0] == pattern:
            ignored = not line.startswith("!")
    return ignored


@pytest.mark.parametrize("source", local_sources())
def test_what_is_copied_exists_and_is_sent_to_the_builder(source: str):
    assert (ROOT / source).exists()
    assert not is_ignored(source)


def test_every_package_of_the_project_is_copied():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()

    assert {source.split("/")[0] for source in local_sources()} >= set(packages)


def test_stages_are_defined_before_they_are_used():
    defined: set[str] = set()
    for name, arguments in instructions():
        words = arguments.split()
        if name == "FROM":
            variants = {words[0].replace("${DEVICE}", device) for device in ("cpu", "cuda")}
            assert "${DEVICE}" not in words[0] or variants <= defined
            defined |= set(words[2:])
        elif name == "COPY" and words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in defined
            assert words[1] == words[2], "an environment can't be moved"


def test_the_cpu_is_the_default_device():
    assert arguments_of("ARG") == ["DEVICE=cpu"]


@pytest.mark.plain
def test_the_targets_of_make_exist():
    targets = re.findall(r"make (\w+)$", "\n".join(arguments_of("RUN")), re.MULTILINE)

    assert targets == ["llama"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_extras_that_are_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[(\w+)\]'", "\n".join(arguments_of("RUN")))

    assert installed == ["demo"]
    assert set(installed) <= set(extras)


def test_the_entry_point_is_the_command_with_settings_that_it_takes():
    command = json.loads(arguments_of("ENTRYPOINT")[0])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    options = {name.removeprefix("--"): value for name, value in zip(command[2::2], command[3::2], strict=True)}
    settings = load_settings(options, {})

    assert command[0] == f"{HOME}/.venv/bin/tightrope"
    assert "tightrope" in scripts
    assert command[1] == "serve"
    assert settings.host == "0.0.0.0"  # loopback inside a container serves nobody
    assert str(settings.port) == arguments_of("EXPOSE")[0]


def test_the_health_check_asks_the_port_that_is_served():
    check = arguments_of("HEALTHCHECK")[0]
    command = json.loads(check[check.index("[") :])
    compile(command[2], "healthcheck", "exec")

    assert command[:2] == [f"{HOME}/.venv/bin/python", "-c"]
    assert f"http://127.0.0.1:{arguments_of('EXPOSE')[0]}/health" in command[2]


def test_the_server_does_not_run_as_root():
    names = [name for name, _ in final_stage()]
    user = next(arguments for name, arguments in final_stage() if name == "USER")

    assert user not in ("root", "0")
    assert f"useradd --uid 10001 --create-home {user}" in "\n".join(a for n, a in final_stage() if n == "RUN")
    assert "RUN" not in names[names.index("USER") :]
