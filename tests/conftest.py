"""Fixtures that several test modules share."""

from collections.abc import Iterator

import pytest
from real_server import RunningServer, run_server


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
