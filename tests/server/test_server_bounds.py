"""Clients that are slow, silent or too many, and an engine that is stuck: what the server holds for them is bounded."""

import asyncio
import resource
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import httpx
import msgspec
import pytest
from fake_api import api, events
from served_app import PATIENCE_S, reply_to, request, serving

from tightrope.engine.process.exchange import STUCK_S
from tightrope.server import answering
from tightrope.server.http import body, connections, sse


async def metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


async def wait_until(http: httpx.AsyncClient, name: str, value: float) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await metric(http, name) != value:
            await asyncio.sleep(0.01)


def rest_of(connection: socket.socket) -> bytes:
    connection.settimeout(PATIENCE_S)
    pieces = []
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def endless(token_ids: Sequence[int]) -> int:
    return ord("a")


async def test_a_reader_that_takes_nothing_is_dropped_and_its_neighbour_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "SEND_TIMEOUT_S", 0.3)
    asked = {"prompt": "a", "max_tokens": 1000, "stream": True, "logprobs": 20}  # more than the sockets' buffers hold
    async with (
        serving(endless, send_buffer=4096) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http,
    ):
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", port))
            slow.sendall(request("/v1/completions", asked))
            neighbour = await http.post("/v1/completions", json={**asked, "max_tokens": 50})
            assert events(neighbour.text)[-1] == "[DONE]"
            await wait_until(http, 'tgi_request_failure{err="dropped"}', 1)
            assert b"[DONE]" not in rest_of(slow)


async def test_a_thousand_clients_that_connect_and_drop_leave_nothing_behind() -> None:
    raw = request("/v1/completions", {"prompt": "a", "max_tokens": 200, "stream": True})

    async def drop(port: int, num_bytes: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        await reader.read(num_bytes)  # before the answer, or in the middle of it
        writer.transport.abort()

    async with (
        serving(endless) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http,
    ):
        for _ in range(25):
            await asyncio.gather(*(drop(port, num_bytes % 2) for num_bytes in range(40)))
        await wait_until(http, "tgi_batch_current_size", 0)
        await wait_until(http, 'tightrope_cache_tokens{state="used"}', 0)
        assert await metric(http, 'tgi_request_failure{err="dropped"}') > 0
        assert await metric(http, 'tgi_request_failure{err="generation"}') == 0
        asked = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert asked.json()["choices"][0]["text"] == "aa"


async def test_a_connection_that_never_asks_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.1)
    async with serving() as port:
        for begun in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: loc"):
            assert await reply_to(port, begun) == b""


@contextmanager
def room_for_files() -> Iterator[int]:
    """As many descriptors as this process may have at all; yields how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_ten_thousand_idle_connections_are_bounded_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as clients:
        most_files = clients.enter_context(room_for_files())
        monkeypatch.setattr(connections, "MAX_CONNECTIONS", min(connections.MAX_CONNECTIONS, most_files // 4))
        most = connections.most_connections()
        wanted = min(10_000, most_files - most - 500)  # the server's ends are files of this process, too
        async with serving() as port:
            loop = asyncio.get_running_loop()

            async def idle() -> socket.socket:
                connection = clients.enter_context(socket.socket())
                connection.setblocking(False)
                await loop.sock_connect(connection, ("127.0.0.1", port))
                return connection

            idles = [one for _ in range(wanted // 250) for one in await asyncio.gather(*(idle() for _ in range(250)))]
            answer = await reply_to(port, request("/generate", {"inputs": "a?"}, "connection: close"))
            assert answer.endswith(b'{"generated_text":"fine"}')
            poll = select.poll()
            for connection in idles:
                poll.register(connection, select.POLLRDHUP)
            assert len(idles) - len(poll.poll(0)) <= most


async def test_a_request_under_way_is_not_closed_for_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 5)
    begun, go_on = threading.Event(), threading.Event()

    def waits(token_ids: Sequence[int]) -> int:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return ord("a")

    async with serving(waits) as port:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
        under_way = asyncio.create_task(reply_to(port, request("/generate", body, "connection: close")))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        others = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        go_on.set()
        assert (await under_way).endswith(b'{"generated_text":"aa"}')
        for _, writer in others:
            writer.close()


@pytest.mark.parametrize("is_complete", [True, False])
async def test_huge_headers_are_told_so(is_complete: bool) -> None:
    async with serving() as port:
        raw = request("/health", b"", "x-long: " + "x" * 40_000, method="GET")
        reply = await reply_to(port, raw if is_complete else raw[:-4])
    head, _, text = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert "longer than 32768 bytes" in msgspec.json.decode(text)["error"]["message"]


async def test_a_long_body_is_no_long_head() -> None:
    async with serving() as port:
        raw = request("/generate", {"inputs": "x" * 100_000}, "connection: close")
        assert (await reply_to(port, raw)).startswith(b"HTTP/1.1 422 ")


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as port:
        first = request("/generate", {"inputs": "hello?"})
        raw = await reply_to(port, first + request("/nothing", b"", "connection: close", method="GET"))
    assert raw.index(b'{"generated_text":"fine"}') < raw.index(b"there is nothing at /nothing")


async def test_a_body_shorter_than_it_says_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "READ_TIMEOUT_S", 0.1)
    async with serving() as port:
        raw = request("/v1/completions", b'{"prompt":', "content-length: 100", "connection: close")
        assert (await reply_to(port, raw)).startswith(b"HTTP/1.1 408 ")


async def test_a_body_longer_than_it_says_closes_the_connection() -> None:
    async with serving() as port:
        raw = request("/generate", b'{"inputs": "a?"}}}}}', "content-length: 16")
        assert b"HTTP/1.1 400 " in await reply_to(port, raw)


async def test_a_long_prefill_is_bridged_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "FIRST_DELTA_S", 0.05)
    monkeypatch.setattr(sse, "PING_S", 0.05)
    go_on = threading.Event()

    def waits(token_ids: Sequence[int]) -> int:
        assert go_on.wait(PATIENCE_S)
        return ord("a")

    async with serving(waits) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        asked = {"prompt": "a", "max_tokens": 2, "stream": True}
        lines: list[str] = []
        async with (
            asyncio.timeout(PATIENCE_S),  # An engine that has failed is bridged without an end.
            httpx.AsyncClient(timeout=PATIENCE_S) as http,
            http.stream("POST", url, json=asked) as reply,
        ):
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                lines.append(line)
                if lines.count(": ping") == 2:
                    go_on.set()
    assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"


async def test_health_is_bad_while_a_step_is_stuck_and_good_again_after_it() -> None:
    now_s = 0.0
    begun, go_on = threading.Event(), threading.Event()

    def sticks(token_ids: Sequence[int]) -> int:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return ord("a")

    async with api(sticks, clock=lambda: now_s) as http:
        now_s = 1000.0
        assert (await http.get("/health")).status_code == 200, "an idle engine owes no step"
        asked = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        now_s += STUCK_S
        assert (await http.get("/health")).status_code == 200
        now_s += 1
        reply = await http.get("/health")
        assert (reply.status_code, reply.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
        assert await metric(http, "tightrope_ready") == 0
        go_on.set()
        assert (await asked).status_code == 200
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/api/extra/abort", "/tokenize", "/nothing"])
async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with serving() as port:
        for headers in (["content-length: 100"], ["transfer-encoding: chunked", "content-length-is: none"]):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(path, b'5\r\n{"pro', *headers))
            await writer.drain()
            writer.transport.abort()
        assert b"fine" in await reply_to(port, request("/generate", {"inputs": "a?"}, "connection: close"))
    # the server has ended, and with it whatever it did for those who left
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []
