"""Fixtures that several test modules share."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from real_server import RunningServer, run_server

# how long an example takes tells how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, help="examples of each property test, instead of its own number")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number = config.getoption("--examples")
    for item in items if number else ():
        test = getattr(item, "obj", None)
        if is_hypothesis_test(test):
            of_test = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(of_test, max_examples=number, database=None)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    """Tests that draw tensors without a seed of their own."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The real server, with its default settings and the bundled model, as a process of its own."""
    with run_server() as running:
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
