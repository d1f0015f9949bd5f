"""The house's floors, checked: imports run downward only, and the front stays free of the models' libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "backends", "engine", "server")  # from the ground up
HEAVY = {"torch", "transformers", "llama_cpp"}
FRONT = ("engine/types.py", "engine/errors.py", "engine/client.py")
# imported by the front, so as light as the front
SHARED_BY_FRONT = ("engine/settings.py", "engine/wire.py", "engine/launch.py", "backends/settings.py")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


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


def test_importing_the_whole_front_loads_no_model_library():
    files = [path.relative_to(ROOT).with_suffix("") for path in sources("server") if path.stem != "__init__"]
    modules = [".".join(("tightrope", *path.parts)) for path in files]
    script = f"import {', '.join(modules)}, sys; print(sorted({HEAVY!r} & set(sys.modules)))"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_the_help_is_printed_without_the_web_framework():
    script = (
        "import sys; from tightrope.server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "finally: print(sorted({'torch', 'fastapi', 'pydantic', 'uvicorn'} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.splitlines()[-1] == "[]"


def test_only_the_dispatcher_imports_a_kernel_implementation():
    # layouts, and what specifies the rest
    free = {
        "column_stack",
        "columns",
        "dispatch",
        "layer",
        "layout",
        "low_rank",
        "native_structs",
        "quantized",
        "reference",
        "rows",
    }
    reached = [
        (path, name)
        for floor in FLOORS
        for path in sources(floor)
        for name in imported(path)
        if floor_of(name) == 0 and path != ROOT / "kernels/dispatch.py"
        if (part := name.split(".")[2]) not in free and not path.is_relative_to(ROOT / "kernels" / part)
    ]

    assert reached == []


def attributes(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}


def test_nothing_but_the_settings_reads_the_environment():
    files = [path for floor in FLOORS for path in sources(floor)]
    readers = {path.relative_to(ROOT).as_posix() for path in files if {"environ", "getenv"} & attributes(path)}

    assert readers == {"server/settings.py"}


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_a_folder_whose_name_others_use_is_no_regular_package(folder: str):
    assert list((ROOT / folder).rglob("__init__.py")) == []
