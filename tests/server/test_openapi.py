"""Requests made from the server's own API page: no answer is a 500, and none is missing on that page."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import schemathesis
import uvicorn
from fake_api import application
from hypothesis import HealthCheck, Phase, given, settings
from one_model import front_of_one
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from vector_api import embedding, in_a_thread

from tightrope.engine.process.client import EngineClient
from tightrope.engine.settings import EngineSettings
from tightrope.server.app import create_app
from tightrope.server.http.connections import Connection
from tightrope.server.settings.settings import ServerSettings

EXAMPLES = 8  # for each route
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Server(uvicorn.Server):
    """uvicorn's server, which leaves the test's signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(listener: socket.socket, servers: list[Server], is_up: threading.Event) -> None:
    beside = {"embedding": embedding("folder", "ranker", max_tokens=32), "launch_embedder": in_a_thread()}
    async with application(max_model_len=48, chat_template="{{ messages[0].content }}?", **beside) as app:
        config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None)
        servers.append(Server(config))
        is_up.set()
        await servers[0].serve([listener])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with a small window, which runs in a thread of its own."""
    servers: list[Server] = []
    is_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        thread = threading.Thread(target=asyncio.run, args=(serve(listener, servers, is_up),))
        thread.start()
        assert is_up.wait(60)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            servers[0].should_exit = servers[0].force_exit = True
            thread.join()


def operations() -> list[APIOperation]:
    """Every route of the API page, which is made without a model."""
    client = EngineClient(EngineSettings())
    app = create_app(front_of_one(client, ServerSettings()))
    return [result.ok() for result in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]


@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.label)
def test_every_answer_is_on_the_api_page(operation: APIOperation, url: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy())
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)

    check()
