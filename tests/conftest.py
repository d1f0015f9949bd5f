"""Fixtures that several test modules share, and which tests are quick, plain and slow."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from real_server import RunningServer, run_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# how long an example takes tells how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

KINDS = ("quick", "plain", "slow")  # an unmarked test is plain
# What stands in every file that holds a test with the mark: only such files are worth their import.
SPELLINGS = {"quick": "mark.quick", "slow": "mark.slow", "vulkan": "mark.vulkan", "hypothesis": "@given("}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, help="examples of each property test, instead of its own number")


def pytest_configure() -> None:
    """Give each of several workers cores of its own: threads that wait for each other must all be running."""
    worker, number = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        place = int(worker.removeprefix("gw")) % number  # one that replaces a crashed one has a number of its own
        os.sched_setaffinity(0, cores[place::number] or cores)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    first, *others = (config.option.markexpr or "none").split()
    if first not in SPELLINGS or "or" in others or not collection_path.match("test_*.py"):
        return None
    return SPELLINGS[first] not in collection_path.read_text("utf-8") or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kinds = [next((mark.name for mark in item.iter_markers() if mark.name in KINDS), "plain") for item in items]
    for item, kind in zip(items, kinds, strict=True):  # the nearest mark counts: a test's own before its file's
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if mark.name not in KINDS]
        item.add_marker(kind)

    if "vulkan" not in (config.option.markexpr or ""):  # they need a build of llama.cpp of their own
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("vulkan")])
        items[:] = [item for item in items if not item.get_closest_marker("vulkan")]

    number = config.getoption("--examples")
    for item in items if number else ():
        test = getattr(item, "obj", None)
        if is_hypothesis_test(test):
            of_test = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(of_test, max_examples=number, database=None)


def pytest_collection_finish() -> None:
    """Spare the collector what stays in any case: looking through all that torch and others define takes seconds."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    """Tests that draw tensors without a seed of their own."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The real server with the bundled model in llama.cpp, as a process of its own, and default settings."""
    with run_server("--gguf-engine=llama.cpp") as running:
        yield running


@pytest.fixture(scope="session")
def server_url(server: RunningServer) -> str:
    """Where the real server answers."""
    return server.url


@pytest.fixture(scope="session")
def torch_server_url() -> Iterator[str]:
    """Where the same model is served by the torch runner, from a bf16 folder with 16-bit keys and values."""
    from hf_models import smollm2_bf16  # here, since torch and the GGUF reader take seconds to import

    with run_server(str(smollm2_bf16()), "--kv-cache=f16", "--max-model-len=2048") as running:
        yield running.url


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium; see tests/support/browser.py."""
    from browser import running_browser  # here, since few tests need it

    with running_browser() as running:
        yield running
