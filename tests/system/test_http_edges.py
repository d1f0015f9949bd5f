"""HTTP as clients really speak it, as bytes: offers of other protocols, old versions, HEAD, odd paths, preflights."""

import json
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import httpx
import pytest
from real_server import run_server

PAGE = "https://chat.example"
ASKED = {"messages": [{"role": "user", "content": "Say yes"}], "max_tokens": 3, "temperature": 0}
OFFERS = {
    "a stock Java client": ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB"],
    "another order": ["Upgrade: h2c,websocket", "Http2-Settings: AAEAAEAAAAIAAAAB", "Connection: keep-alive, upgrade"],
    "websocket": ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that lets in the pages of one site."""
    with run_server("--cors-origins", PAGE, "--max-model-len=512", "--kv-cache-tokens=1024") as running:
        yield running.url


def replies(url: str, pieces: Sequence[bytes], num_replies: int = 1) -> list[httpx.Response]:
    """Send the pieces one after another, and read that many replies of which each tells its length."""
    place = urlsplit(url)
    made = []
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        reader = connection.makefile("rb")
        for _ in range(num_replies):
            status = int(reader.readline().split()[1])
            headers = dict(line.decode().rstrip().split(": ", 1) for line in iter(reader.readline, b"\r\n"))
            made.append(httpx.Response(status, headers=headers, content=reader.read(int(headers["content-length"]))))
    return made


def until_closed(url: str, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of a reply that ends with its connection."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall(request)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    return head.lower(), body


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


def chunked(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    head = "\r\n".join((*lines, "Transfer-Encoding: chunked", "", "")).encode()
    halves = body[: len(body) // 2], body[len(body) // 2 :]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in halves) + b"0\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_an_offer_of_another_protocol_is_passed_over_with_the_body_kept(url: str, offer: list[str]) -> None:
    body = json.dumps(ASKED).encode()
    raw = post("/v1/chat/completions", body, *offer)
    (plain,) = replies(url, [post("/v1/chat/completions", body)])
    in_pieces = [raw[:40], raw[40:120], raw[120 : -len(body) + 5], raw[-len(body) + 5 :]]
    twice = replies(url, [raw + raw], 2)
    for reply in (
        *replies(url, [raw]),
        *replies(url, in_pieces),
        *replies(url, [chunked("/v1/chat/completions", body, *offer)]),
        *twice,
    ):
        assert (reply.status_code, reply.json()["choices"]) == (200, plain.json()["choices"])
    get = "\r\n".join(("GET /v1/models HTTP/1.1", "Host: localhost", *offer, "", "")).encode()
    assert replies(url, [get])[0].json()["data"]


def test_a_tunnel_is_refused(url: str) -> None:
    head, _ = until_closed(url, b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
    assert head.startswith(b"http/1.1 400")


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/chat/completions", {**ASKED, "stream": True}, b"data: [DONE]\n\n"),
        ("/api/chat", {**ASKED, "options": {"num_predict": 3}}, b"}\n"),
        ("/generate_stream", {"inputs": "Say", "parameters": {"max_new_tokens": 3}}, b"}\n\n"),
        ("/api/extra/generate/stream", {"prompt": "Say", "max_length": 3}, b"}\n\n"),
    ],
)
def test_a_stream_over_http_1_0_ends_by_closing(url: str, path: str, body: dict[str, object], end: bytes) -> None:
    head, streamed = until_closed(url, post(path, json.dumps(body).encode(), version="1.0"))
    assert head.startswith(b"http/1.1 200")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert streamed.startswith((b"data: ", b'{"model"', b"event: "))
    assert streamed.endswith(end)


def test_a_whole_answer_over_http_1_0_tells_its_length(url: str) -> None:
    head, body = until_closed(url, post("/v1/chat/completions", json.dumps(ASKED).encode(), version="1.0"))
    assert b"content-length: %d" % len(body) in head
    assert json.loads(body)["choices"]


def test_head_answers_as_get_does_wherever_get_is(url: str) -> None:
    paths = [
        path for path, item in httpx.get(f"{url}/openapi.json", timeout=60).json()["paths"].items() if "get" in item
    ]
    assert len(paths) > 25
    for path in (*paths, "/docs", "/openapi.json", "/nothing"):
        asked = path.replace("{model}", "nothing").replace("{stream_id}", "nothing")
        whole, head = httpx.get(url + asked, timeout=60), httpx.head(url + asked, timeout=60)
        assert (head.status_code, head.content) == (whole.status_code, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"] if whole.content else True
    reply = httpx.head(f"{url}/v1/completions", timeout=60)
    assert (reply.status_code, reply.headers["allow"]) == (405, "OPTIONS, POST")
    assert httpx.options(f"{url}/v1/models", timeout=60).headers["allow"] == "GET, HEAD, OPTIONS"
    assert httpx.get(f"{url}/v1/health", timeout=60).status_code == 200


def test_a_stream_that_only_its_head_is_asked_of_is_not_read(url: str) -> None:
    headers = {"x-resumable": "1"}
    began = httpx.post(
        f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3, "stream": True}, headers=headers, timeout=60
    )
    stream = f"{url}/v1/stream/{began.headers['x-stream-id']}"
    assert httpx.head(stream, timeout=60).status_code == 200
    assert httpx.get(stream, timeout=60).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    "path", ["/v1//models", "//v1/models", "/v1/v1/models", "/v1/models/", "//v1//v1//models//", "/v1/v1/v1/models"]
)
def test_doubled_slashes_and_a_doubled_v1_reach_their_route(url: str, path: str) -> None:
    assert httpx.get(url + path, timeout=60).json()["data"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1//chat/completions", ASKED),
        ("/v1/v1/chat/completions/", ASKED),
        ("//generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}}),
        ("//api//generate", {"prompt": "a", "stream": False, "options": {"num_predict": 2}}),
        ("/api/api/v1/generate", {"prompt": "a", "max_length": 2}),
        ("//", {"inputs": "a", "parameters": {"max_new_tokens": 2}}),
    ],
)
def test_a_body_reaches_its_route_by_such_paths_too(url: str, path: str, body: dict[str, object]) -> None:
    reply = httpx.post(url + path, json=body, timeout=60)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    "headers",
    [
        "authorization,content-type,x-stainless-os,x-stainless-lang,x-stainless-runtime,x-stainless-retry-count",
        "anthropic-dangerous-direct-browser-access,anthropic-version,anthropic-beta,content-type,x-api-key",
        "content-type,x-requested-with,x-title,http-referer",
        "x-resumable,last-event-id",
    ],
)
def test_a_preflight_of_a_named_origin_is_let_in_with_what_sdks_send(url: str, headers: str) -> None:
    asked = {"origin": PAGE, "access-control-request-headers": headers}
    for path, method in (
        ("/v1/chat/completions", "POST"),
        ("/v1//v1/chat/completions", "POST"),
        ("/api/chat", "POST"),
        ("/generate", "POST"),
        ("/v1/models", "GET"),
        ("/v1/models", "HEAD"),
        ("/v1/stream/x", "DELETE"),
    ):
        reply = httpx.options(url + path, headers={**asked, "access-control-request-method": method}, timeout=60)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, PAGE)
        assert reply.headers["access-control-allow-headers"] == headers
