"""The house's floors, checked: imports run downward only, and the front stays free of the models' libraries."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from checkout import ROOT

pytestmark = pytest.mark.quick

FLOORS = ("kernels", "backends", "engine", "server")  # from the ground up
HEAVY = {"torch", "transformers", "llama_cpp"}
FRONT = (
    *("engine/protocol.py", "engine/types.py", "engine/errors.py"),
    *("engine/sampler/steps.py", "engine/process/client.py", "engine/embedding/client.py"),
)
# imported by the front, so as light as the front
SHARED_BY_FRONT = ("engine/settings.py", "engine/process/wire.py", "engine/process/launch.py", "backends/settings.py")
SHARED_BY_FRONT += ("backends/embedding/card.py",)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Full names of everything that a file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def floor_of(name: str) -> int | None:
    """The floor that an import name lives on, 0 at the ground; None outside the house."""
    parts = name.split(".")
    return FLOORS.index(parts[1]) if parts[0] == "tightrope" and parts[1:2] and parts[1] in FLOORS else None


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_nothing_from_the_floors_above_it(floor: str):
    height = FLOORS.index(floor)
    upward = [(path.name, name) for path in sources(floor) for name in imported(path) if (floor_of(name) or 0) > height]

    assert upward == []


def test_the_floors_are_imported_by_their_full_names():
    short = [
        (path, name)
        for floor in FLOORS
        for path in sources(floor)
        for name in imported(path)
        if name.split(".")[0] in FLOORS
    ]

    assert short == []


@pytest.mark.parametrize("path", [*sources("server"), *(ROOT / name for name in (*FRONT, *SHARED_BY_FRONT))], ids=str)
def test_the_front_imports_no_model_library(path: Path):
    assert {name.split(".")[0] for name in imported(path)} & HEAVY == set()


@pytest.mark.plain
def test_importing_the_whole_front_loads_no_model_library():
    files = [path.relative_to(ROOT).with_suffix("") for path in sources("server") if path.stem != "__init__"]
    modules = [".".join(("tightrope", *path.parts)) for path in files]
    script = f"import {', '.join(modules)}, sys; print(sorted({HEAVY!r} & set(sys.modules)))"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


@pytest.mark.plain
def test_scheduling_and_writing_load_no_model_library():
    script = (
        f"import tightrope.backends.protocol, tightrope.engine.writer, sys\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


@pytest.mark.plain
def test_the_help_is_printed_without_the_web_framework():
    script = (
        "import sys; from tightrope.server.cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "finally: print(sorted({'torch', 'fastapi', 'pydantic', 'uvicorn'} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.splitlines()[-1] == "[]"


def test_only_what_chooses_imports_a_kernel_implementation():
    # for steps and for loads; what crosses, the specification, and what tries them out
    choosing = ("dispatch", "packing")
    free = (*choosing, "forms", "reference", "trial")
    reached = [
        (path, name)
        for floor in FLOORS
        for path in sources(floor)
        for name in imported(path)
        if floor_of(name) == 0 and path not in [ROOT / f"kernels/{chooser}.py" for chooser in choosing]
        if (part := name.split(".")[2]) not in free and not path.is_relative_to(ROOT / "kernels" / part)
    ]

    assert reached == []


@cache
def modules() -> dict[str, set[str]]:
    """Every module of the house, as a path without its ending, with the modules that it imports."""
    names = {path.relative_to(ROOT).with_suffix("").as_posix(): path for floor in FLOORS for path in sources(floor)}
    found = {}
    for name, path in names.items():
        paths = {full.removeprefix("tightrope.").replace(".", "/") for full in imported(path)}
        found[name] = {known for full in paths for known in (full, full.rpartition("/")[0]) if known in names} - {name}
    return found


def test_no_two_folders_import_each_other():
    """A folder and one inside it aside: what puts a folder's parts together may stand above them."""
    folders = {
        (a.rpartition("/")[0], b.rpartition("/")[0]): (a, b) for a, imports in modules().items() for b in imports
    }
    apart = {
        (a, b) for a, b in folders if a != b and not f"{a}/".startswith(f"{b}/") and not f"{b}/".startswith(f"{a}/")
    }

    assert [(folders[a, b], folders[b, a]) for a, b in sorted(apart) if (b, a) in apart and a < b] == []


def test_no_file_imports_one_that_imports_it():
    """However long the way around is, and imports for types alone included."""
    graph = modules()
    while outer := {
        name
        for name, imports in graph.items()
        if not imports & graph.keys() or not any(name in others for others in graph.values())
    }:
        graph = {name: imports for name, imports in graph.items() if name not in outer}

    assert sorted(graph) == []


def test_the_backends_know_nothing_of_each_other():
    graph = modules()
    ways = {"backends/gguf": "backends/hf", "backends/hf": "backends/gguf"}
    crossing = [
        (a, b)
        for a, imports in graph.items()
        for b in imports
        for x, y in ways.items()
        if a.startswith(x)
        if b.startswith(y)
    ]

    assert crossing == []


def dialect(module: str) -> str | None:
    """The dialect that a module is part of, be it a file or a folder; None outside of them all."""
    return module.split("/")[2] if module.startswith("server/dialects/") else None


def test_no_dialect_imports_another():
    graph = modules()
    crossing = [(a, b) for a, imports in graph.items() for b in imports if dialect(a) and dialect(b)]

    assert [(a, b) for a, b in crossing if dialect(a) != dialect(b)] == []


def test_what_dialects_share_knows_none_of_them():
    above = ("server/app", "server/shared_paths/")  # what puts them together, and paths that several have
    graph = modules()
    knowing = {a for a, imports in graph.items() if not dialect(a) and any(map(dialect, imports))}

    assert [a for a in sorted(knowing) if not a.startswith(above)] == []


def attributes(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}


def test_nothing_but_the_settings_reads_the_environment():
    files = [path for floor in FLOORS for path in sources(floor)]
    readers = {path.relative_to(ROOT).as_posix() for path in files if {"environ", "getenv"} & attributes(path)}

    assert readers == {"server/settings/settings.py"}


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_a_folder_whose_name_others_use_is_no_regular_package(folder: str):
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_the_front_names_a_way_to_run_an_engine_only_where_it_starts_one():
    ways = {"engine/process/client", "engine/process/launch", "engine/embedding/client"}
    cluster = {f"server/cluster/{name}" for name in ("application", "front", "local", "relay", "replica")}
    graph = modules()

    starting = {name for name in graph if name.startswith("server/") and graph[name] & ways}
    assert starting == {"server/cli/serve", *cluster}
