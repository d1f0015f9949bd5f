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
