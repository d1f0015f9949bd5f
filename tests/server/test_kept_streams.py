"""Streams that outlive their connection: nothing is lost or doubled, for whom they are, and what they may cost."""

import asyncio
import random
import re
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from fake_api import api
from fakes import letters
from served_app import PATIENCE_S, request, serving

from tightrope.backends.errors import BackendError
from tightrope.engine.errors import InvalidRequest
from tightrope.server.http import kept_streams
from tightrope.server.http.errors import StreamNotFound
from tightrope.server.http.kept_streams import OVERHEAD_BYTES, PING, KeptStream, KeptStreams

RESUMABLE = {"x-resumable": "1"}
LENGTH = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
PATHS: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Well", **LENGTH, "stream": True, "stream_options": {"include_usage": True}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Well"}], **LENGTH, "stream": True},
    "/generate_stream": {"inputs": "Well", "parameters": {"max_new_tokens": 60}},
    "/completion": {"prompt": "Well", **LENGTH, "stream": True},
    "/api/extra/generate/stream": {"prompt": "Well", **LENGTH},
    "/api/generate": {"prompt": "Well", "raw": True, **LENGTH},
    "/v1/responses": {"input": "Well", **LENGTH, "stream": True},
    "/v1/messages": {"messages": [{"role": "user", "content": "Well"}], **LENGTH, "stream": True},
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
VOLATILE = re.compile(
    r'"(id|item_id|created|created_at|completed_at|input_tokens|cache_\w+_tokens|cache_\w+_input_tokens|\w+_duration|\w+_ms|cached_tokens|tokens_cached|prompt_n)":("[^"]*"|[\d.]+)'
)


def plain(text: str) -> list[str]:
    """The events or lines of a stream without ids and without what is new each time."""
    lines = [line for line in text.splitlines() if line and not line.startswith((":", "id: "))]
    return [VOLATILE.sub("", line) for line in lines]


def num_events(text: str, *, is_lines: bool) -> int:
    """How many whole events a client has read of what came."""
    return text.count("\n") if is_lines else len(re.findall(r"^id: \S+\n(?:.+\n)+\n", text, re.MULTILINE))


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_is_read_on_from_every_event_in_every_dialect(path: str) -> None:
    is_lines = path == "/api/generate"
    async with api(letters, chat_template=TEMPLATE) as http:
        without = await http.post(path, json=PATHS[path])
        assert "x-stream-id" not in without.headers
        assert "id: " not in without.text
        whole = await http.post(path, json=PATHS[path], headers=RESUMABLE)
        stream_id = whole.headers["x-stream-id"]
        assert plain(whole.text) == plain(without.text)
        count = num_events(whole.text, is_lines=is_lines)
        assert count > 40
        if not is_lines:
            ids = re.findall(r"^id: (\S+)$", whole.text, re.MULTILINE)
            assert ids == [f"{stream_id}.{number}" for number in range(1, count + 1)]
        mark = "\n" if is_lines else "\n\n"
        events = [event + mark for event in whole.text.split(mark)[:-1]]
        for number in (0, 1, count // 2, count - 1, count):
            last = {"last-event-id": f"{stream_id}.{number}"}
            rest = await http.get(f"/v1/stream/{stream_id}", headers=last)
            assert rest.text == "".join(events[number:])
            assert rest.headers["content-type"] == whole.headers["content-type"]
            again = await http.post(path, json=PATHS[path], headers=last)
            assert again.text == rest.text, "who asks the same again is not answered anew"
        for place in (0, 1, len(whole.content) // 2, len(whole.content) - 1, len(whole.content)):
            rest = await http.get(f"/v1/stream/{stream_id}", params={"from": place})
            assert rest.content == whole.content[place:]


async def cut(port: int, raw: bytes, num_bytes: int) -> str:
    """What comes before the socket is cut behind so many bytes of the reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    got = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(got) < num_bytes and (more := await reader.read(num_bytes - len(got))):
            got += more
    writer.transport.abort()
    head, _, rest = got.partition(b"\r\n\r\n")
    assert b"x-stream-id" in head
    body = b""
    while rest:  # Of the last chunk a part may be there, or of its length.
        length, _, rest = rest.partition(b"\r\n")
        size = int(length, 16) if rest else 0
        body, rest = body + rest[:size], rest[size + 2 :]
    return f"{head.decode()}\n\n{body.decode()}"


async def test_of_streams_cut_anywhere_and_several_times_nothing_is_lost_or_doubled() -> None:
    rng = random.Random(1)
    body = {**PATHS["/v1/completions"], "max_tokens": 200}
    async with serving(letters) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        whole = (await http.post("/v1/completions", json=body)).text
        for _ in range(20):
            raw = request("/v1/completions", body, "x-resumable: 1")
            head, _, text = (await cut(port, raw, rng.randrange(700, 20_000))).partition("\n\n")
            found = re.search(r"x-stream-id: (\S+)", head)
            assert found
            path = f"/v1/stream/{found[1]}"
            had = "".join(re.findall(r"id: \S+\ndata: .*\n\n", text))
            for _ in range(2):
                count = num_events(had, is_lines=False)
                raw = request(path, b"", f"last-event-id: {found[1]}.{count}", method="GET")
                text = (await cut(port, raw, rng.randrange(700, 10_000))).partition("\n\n")[2]
                had += "".join(re.findall(r"id: \S+\ndata: .*\n\n", text))
            last = {"last-event-id": f"{found[1]}.{num_events(had, is_lines=False)}"}
            assert plain(had + (await http.get(path, headers=last)).text) == plain(whole)


async def test_who_counts_bytes_goes_on_in_the_middle_of_an_event() -> None:
    rng = random.Random(2)
    body = {**PATHS["/v1/completions"], "max_tokens": 200}
    asked = request("/v1/completions", body, "x-conversation-id: a chat::some/model")
    conversation = {"conv_id": "a chat::some/model"}
    async with serving(letters) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        whole = (await http.post("/v1/completions", json=body)).text
        for _ in range(5):
            had = (await cut(port, asked, rng.randrange(700, 20_000))).partition("\n\n")[2]
            for _ in range(3):
                path = f"/v1/stream?{urlencode({**conversation, 'from': len(had)})}"
                more = await cut(port, request(path, b"", method="GET"), rng.randrange(700, 10_000))
                had += more.partition("\n\n")[2]
            rest = await http.get("/v1/stream", params={**conversation, "from": len(had)})
            assert plain(had + rest.text) == plain(whole)


async def test_only_the_key_that_began_a_stream_finds_it() -> None:
    one, admin = {"authorization": "Bearer one"}, {"x-admin-key": "admin"}
    async with api(letters, api_key="one", admin_key="admin") as http:
        began = await http.post("/v1/completions", json=PATHS["/v1/completions"], headers=RESUMABLE | one)
        path = f"/v1/stream/{began.headers['x-stream-id']}"
        unknown = await http.get("/v1/stream/unknown", headers=one)
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "stream_not_found"
        for method in ("GET", "DELETE"):
            assert (await http.request(method, path)).status_code == 401
            other = await http.request(method, path, headers=admin)
            assert (other.status_code, other.json()["error"]["code"]) == (404, "stream_not_found")
        last = {"last-event-id": f"{path.rpartition('/')[2]}.3"}
        other = await http.post("/v1/completions", json=PATHS["/v1/completions"], headers=last | admin)
        assert other.status_code == 404
        assert (await http.get(path, headers=one)).text == began.text
    async with api(letters) as http:
        began = await http.post("/v1/completions", json=PATHS["/v1/completions"], headers=RESUMABLE | one)
        path = f"/v1/stream/{began.headers['x-stream-id']}"
        assert (await http.get(path, headers={"authorization": "Bearer two"})).status_code == 404
        assert (await http.get(path)).status_code == 404
        assert (await http.get(path, headers=one)).text == began.text


@pytest.mark.parametrize(
    ("headers", "number"),
    [
        ({}, "-1"),
        ({}, "x"),
        ({}, "1e3"),
        ({}, "9" * 400),
        ({}, "100000"),
        ({}, "\u0663"),
        ({"last-event-id": "7"}, "0"),
        ({"last-event-id": "other.7"}, "0"),
        ({"last-event-id": "ID.-7"}, "0"),
        ({"last-event-id": "ID.999999"}, "0"),
    ],
)
async def test_a_place_that_is_none_is_refused_in_one_line(headers: dict[str, str], number: str) -> None:
    async with api(letters) as http:
        began = await http.post("/v1/completions", json=PATHS["/v1/completions"], headers=RESUMABLE)
        stream_id = began.headers["x-stream-id"]
        headers = {name: value.replace("ID", stream_id) for name, value in headers.items()}
        reply = await http.get(f"/v1/stream/{stream_id}", params={"from": number}, headers=headers)
        assert reply.status_code == 400
        assert "\n" not in reply.json()["error"]["message"]
        assert reply.json()["error"]["param"] in ("from", "Last-Event-ID")


async def test_the_opt_in_is_a_header_or_a_field_and_nothing_else() -> None:
    body = PATHS["/v1/completions"]
    async with api(letters) as http:
        assert "x-stream-id" in (await http.post("/v1/completions", json={**body, "resumable": True})).headers
        for headers in ({}, {"x-resumable": "0"}):
            assert "x-stream-id" not in (await http.post("/v1/completions", json=body, headers=headers)).headers
        wrong = await http.post("/v1/completions", json=body, headers={"x-resumable": "yes"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "X-Resumable")
        asked = {**body, "stream": False, "stream_options": None, "resumable": True, "explain": True}
        listed = (await http.post("/v1/completions", json=asked)).json()["explain"]["ignored"]
        assert [entry["field"] for entry in listed] == ["resumable"]


async def test_a_conversation_has_one_stream_that_is_looked_up_and_stopped() -> None:
    path, named = "/v1/completions", {"x-conversation-id": "chat"}
    async with api(letters, api_key="one", admin_key="admin") as http:
        http.headers["authorization"] = "Bearer one"
        first = await http.post(path, json=PATHS[path], headers=named)
        second = await http.post(path, json=PATHS[path], headers=named)
        other = await http.post(path, json=PATHS[path], headers={"x-conversation-id": "chat::model"})
        assert (await http.get(f"/v1/stream/{first.headers['x-stream-id']}")).status_code == 404
        assert (await http.get("/v1/stream", params={"conv_id": "chat"})).text == second.text
        assert (await http.get("/v1/stream", params={"conv_id": "chat", "from": 9})).text == second.text[9:]

        asked = {"conversation_ids": ["chat", "none", "cha"]}
        found = (await http.post("/v1/streams/lookup", json=asked)).json()
        assert [one["conversation_id"] for one in found] == ["chat", "chat::model"]
        assert [one["total_bytes"] for one in found] == [len(second.content), len(other.content)]
        assert all(one["is_done"] and 0 < one["started_at"] <= one["completed_at"] for one in found)
        admin = {"authorization": "", "x-admin-key": "admin"}
        assert (await http.post("/v1/streams/lookup", json=asked, headers=admin)).json() == []
        assert (await http.get("/v1/stream", params={"conv_id": "chat"}, headers=admin)).status_code == 404

        assert (await http.delete("/v1/stream", params={"conv_id": "chat"}, headers=admin)).status_code == 204
        assert (await http.get("/v1/stream", params={"conv_id": "chat"})).status_code == 200
        for _ in range(2):
            gone = await http.delete("/v1/stream", params={"conv_id": "chat"})
            assert (gone.status_code, gone.content) == (204, b"")
            assert (await http.get("/v1/stream", params={"conv_id": "chat"})).status_code == 404
        assert (await http.get("/v1/stream", params={"conv_id": "chat::model"})).text == other.text


@pytest.mark.parametrize(
    "query", ["", "conv_id=", "conv_id=chat&from=x", "conv_id=chat&from=-1", "conv_id=chat&from=999999"]
)
async def test_a_conversation_that_is_asked_for_wrongly_is_refused_in_one_line(query: str) -> None:
    async with api(letters) as http:
        await http.post("/v1/completions", json=PATHS["/v1/completions"], headers={"x-conversation-id": "chat"})
        reply = await http.get(f"/v1/stream?{query}")
        assert reply.status_code == 400
        assert "\n" not in reply.json()["error"]["message"]
        long = {"x-conversation-id": "c" * 300}
        assert (await http.post("/v1/completions", json=PATHS["/v1/completions"], headers=long)).status_code == 400
        assert (await http.post("/v1/streams/lookup", json={"conversation_ids": "chat"})).status_code == 400


async def test_a_named_stream_is_written_for_a_client_that_left_before_its_first_word() -> None:
    go_on = threading.Event()

    def waits(token_ids: Sequence[int]) -> int:
        assert go_on.wait(PATIENCE_S)
        return letters(token_ids)

    body = PATHS["/v1/completions"]
    async with serving(waits) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        for name in ("read", "stopped"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("/v1/completions", body, f"x-conversation-id: {name}"))
            async with asyncio.timeout(PATIENCE_S):
                while not (await http.post("/v1/streams/lookup", json={"conversation_ids": [name]})).json():
                    await asyncio.sleep(0)
            writer.transport.abort()
        assert (await http.delete("/v1/stream", params={"conv_id": "stopped"})).status_code == 204
        go_on.set()
        assert plain((await http.get("/v1/stream", params={"conv_id": "read"})).text) == plain(
            (await http.post("/v1/completions", json=body)).text
        )
        assert (await http.get("/v1/stream", params={"conv_id": "stopped"})).status_code == 404
        await until_metric(http, "tightrope_cancelled_total", 1.0)


async def until_metric(http: httpx.AsyncClient, name: str, value: float) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while f"{name} {value}" not in (await http.get("/metrics")).text.splitlines():
            await asyncio.sleep(0)


LONG = {**PATHS["/v1/completions"], "max_tokens": 900}


async def test_a_stream_is_written_on_without_its_client_until_it_is_stopped() -> None:
    async with serving(letters) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        head = (await cut(port, request("/v1/completions", LONG, "x-resumable: 1"), 800)).lower()
        found = re.search(r"x-stream-id: (\S+)", head)
        assert found
        assert "tightrope_cancelled_total 0.0" in (await http.get("/metrics")).text
        raw = request("/v1/completions", LONG, "x-resumable: 1")
        text = await cut(port, raw, 800)
        stream_id = re.findall(r"x-stream-id: (\S+)", text)[0]
        assert (await http.delete(f"/v1/stream/{stream_id}")).json() == {"id": stream_id, "stopped": True}
        assert (await http.delete(f"/v1/stream/{stream_id}")).status_code == 404
        assert (await http.get(f"/v1/stream/{stream_id}")).status_code == 404
        await until_metric(http, "tightrope_cancelled_total", 1.0)


async def test_a_stream_that_nobody_reads_is_given_up_in_time() -> None:
    async with (
        serving(letters, keep_streams_s=0.001) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        text = await cut(port, request("/v1/completions", LONG, "x-resumable: 1"), 800)
        stream_id = re.findall(r"x-stream-id: (\S+)", text)[0]
        await until_metric(http, "tightrope_cancelled_total", 1.0)
        assert (await http.get(f"/v1/stream/{stream_id}")).status_code == 404


async def test_an_error_in_the_middle_is_the_last_event_of_a_kept_stream_too() -> None:
    def fails(token_ids: Sequence[int]) -> int:
        if len(token_ids) > 40:
            raise BackendError("the model broke")
        return letters(token_ids)

    async with api(fails) as http:
        whole = await http.post("/v1/completions", json=PATHS["/v1/completions"], headers=RESUMABLE)
        assert "the model broke" in whole.text.split("\n\n")[-2]
        assert num_events(whole.text, is_lines=False) > 20
        assert (await http.get(f"/v1/stream/{whole.headers['x-stream-id']}")).text == whole.text


# ---- what they may cost ----


async def given(*pieces: bytes) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece


def begin(streams: KeptStreams, pieces: AsyncGenerator[bytes, None]) -> KeptStream:
    stream = streams.open(b"", "openai")
    streams.write(stream, pieces)
    return stream


async def read(streams: KeptStreams, stream: KeptStream, place: int = 0) -> bytes:
    return b"".join([piece async for piece in streams.read(stream, place)])


async def test_what_has_ended_goes_first_and_a_stream_that_is_too_long_loses_its_beginning() -> None:
    streams = KeptStreams(4 * OVERHEAD_BYTES, 60.0)
    ended = begin(streams, given(b"data: a\n\n"))
    await read(streams, ended)
    other = begin(streams, given(b"data: b\n\n"))
    await read(streams, other)
    events = [b"data: %4d %b\n\n" % (number, b"x" * 1000) for number in range(50)]
    long = begin(streams, given(*events))
    assert long.task is not None
    await long.task

    assert streams.num_bytes == long.num_bytes <= 4 * OVERHEAD_BYTES
    for gone in (ended, other):
        with pytest.raises(StreamNotFound, match="not kept any more"):
            streams.find(gone.id, b"")
    with pytest.raises(StreamNotFound, match="are not kept any more"):
        await read(streams, long, long.behind(3))
    rest = await read(streams, long, long.behind(45))
    assert rest == b"".join(b"id: %b.%d\n%b" % (long.id.encode(), n + 1, events[n]) for n in range(45, 50))
    with pytest.raises(InvalidRequest, match="has 50 events"):
        long.behind(51)
    await streams.close()
    assert (len(streams), streams.num_bytes) == (0, 0)


async def test_comments_have_no_number_and_are_bytes_of_the_stream() -> None:
    streams = KeptStreams(1 << 20, 60.0)
    comment = b": read 1 of 2 tokens\n\n"
    stream = begin(streams, given(b"data: a\n\n", comment, b"data: b\n\n" + comment + b"data: c\n\n"))
    whole = await read(streams, stream)
    name = stream.id.encode()
    a, b, c = (b"id: %b.%d\ndata: %b\n\n" % (name, n, letter) for n, letter in enumerate((b"a", b"b", b"c"), 1))
    assert whole == a + comment + b + comment + c
    assert await read(streams, stream, stream.behind(1)) == comment + b + comment + c
    assert await read(streams, stream, stream.behind(3)) == b""
    await streams.close()


async def test_a_silent_stream_is_pinged_for_all_who_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_streams, "PING_S", 0.002)
    goes_on = asyncio.Event()

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"data: a\n\n"
        await goes_on.wait()
        yield b"data: b\n\n"

    streams = KeptStreams(1 << 20, 60.0)
    stream = begin(streams, pieces())
    had = b""
    async for piece in streams.read(stream):
        had += piece
        if had.count(PING) > 2:
            goes_on.set()
    assert had == await read(streams, stream)
    assert had.replace(PING, b"") == b"".join(
        b"id: %b.%d\ndata: %b\n\n" % (stream.id.encode(), n, letter) for n, letter in enumerate((b"a", b"b"), 1)
    )
    await streams.close()
