"""What an installed tightrope holds."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version

import pytest
from checkout import ROOT

import tightrope

pytestmark = pytest.mark.slow

PINNED = dict(line.split("==") for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if "==" in line)
FLOORS = ("server", "engine", "backends", "kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built with the setuptools that is here, from a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    source = folder / "source"
    for name in names.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and name.split("/")[0] not in ("tests", "bench", "docs"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_python_file_of_every_floor(wheel: zipfile.ZipFile):
    expected = {
        f"tightrope/{path.relative_to(ROOT).as_posix()}" for floor in FLOORS for path in (ROOT / floor).rglob("*.py")
    }

    assert expected - set(wheel.namelist()) == set()


def test_the_wheel_holds_every_file_of_the_page(wheel: zipfile.ZipFile):
    files = [path for path in (ROOT / "server/page/static").rglob("*") if path.is_file()]
    expected = {f"tightrope/{path.relative_to(ROOT).as_posix()}" for path in files}

    assert expected - set(wheel.namelist()) == set()


def test_the_wheel_holds_nothing_outside_its_own_package(wheel: zipfile.ZipFile):
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "tightrope",
        f"tightrope-{tightrope.__version__}.dist-info",
    }


def test_the_wheel_names_the_command_and_the_version(wheel: zipfile.ZipFile):
    folder = f"tightrope-{tightrope.__version__}.dist-info"

    assert "tightrope = tightrope.server.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert f"\nVersion: {tightrope.__version__}\n" in wheel.read(f"{folder}/METADATA").decode()


def test_the_type_checkers_links_lead_to_the_floors():
    for floor in FLOORS:
        link = ROOT / "tightrope" / floor
        assert link.is_symlink()
        assert link.resolve() == ROOT / floor


@pytest.mark.quick
def test_every_folder_with_code_is_a_package_that_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]

    assert {".".join(("tightrope", *file.parent.parts)) for file in files} - set(listed) == set()


@pytest.mark.plain
def test_the_tests_run_on_the_releases_that_are_pinned():
    by_torch = [line for line in requires("torch") or () if line.startswith("triton==")]  # where it is built for CUDA

    assert {name: version(name).partition("+")[0] for name in PINNED} == PINNED
    assert all(line.startswith(f"triton=={PINNED['triton']}") for line in by_torch)
    assert f"Triton {PINNED['triton']}, which it pins" in (ROOT / "docs/installing.md").read_text("utf-8")


@pytest.mark.plain
def test_the_constraints_pin_what_must_not_be_resolved_freely():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]

    assert PINNED.keys() == {"torch", "llama-cpp-python", "triton"}
    assert all(any(line.startswith(f"{name}>=") for line in wanted) for name in PINNED)
