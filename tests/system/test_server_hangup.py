"""Clients that hang up, and clients that send nonsense, on the real server: the others notice nothing."""

import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

LONG = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}
GENERATE = {"inputs": "1, 2, 3,", "parameters": {"max_new_tokens": 4000}}  # greedy: it counts on and on
PATIENCE_S = 120


def metric(url: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{url}/metrics", timeout=60).text, re.MULTILINE)
    assert found, name
    return float(found[1])


def wait_until(url: str, name: str, value: float) -> None:
    """Poll a gauge until it has the value; each poll is a request that takes its time."""
    deadline = time.monotonic() + PATIENCE_S
    while metric(url, name) != value:
        assert time.monotonic() < deadline, f"{name} never became {value}"


def wait_until_above(url: str, name: str, value: float, why: str) -> None:
    """Poll a counter likewise: the engine counts a little after the front has let go of the client."""
    deadline = time.monotonic() + PATIENCE_S
    while metric(url, name) <= value:
        assert time.monotonic() < deadline, why


def send(url: str, path: str, body: dict[str, object]) -> socket.socket:
    """A request on a connection of its own."""
    address = urlsplit(url)
    raw = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Tell me.", **LONG}),
        ("/v1/completions", {"prompt": ["Tell me.", "Tell him."], **LONG, "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell me."}], **LONG}),
        ("/v1/completions", {"prompt": "Tell me.", "logprobs": 2, **LONG}),
        ("/", GENERATE),
        ("/completion", {"prompt": "Tell me.", **LONG}),
        ("/api/generate", {"prompt": "Tell me.", "options": LONG}),
        ("/api/v1/generate", {"prompt": "Tell me.", **LONG}),
        ("/api/extra/generate/stream", {"prompt": "Tell me.", **LONG}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_ends_the_work_at_once(server_url: str, path: str, body: dict[str, object], stream: bool) -> None:
    num_answers = 4 if "n" in body else 1
    cancelled = metric(server_url, "tightrope_cancelled_total")
    connection = send(server_url, path, {**body, "stream": stream})
    wait_until(server_url, "tgi_batch_current_size", num_answers)
    connection.close()
    wait_until(server_url, "tgi_batch_current_size", 0)
    wait_until_above(server_url, "tightrope_cancelled_total", cancelled, "it did not just run to its end")


def test_a_client_that_hangs_up_in_prefill_costs_no_answer(server_url: str) -> None:
    body = {"prompt": [i % 30000 + 100 for i in range(7000)], **LONG, "max_tokens": 1000, "stream": True}
    connection = send(server_url, "/v1/completions", body)
    wait_until(server_url, "tgi_batch_current_size", 1)
    connection.close()
    wait_until(server_url, "tgi_batch_current_size", 0)


def test_nonsense_leaves_the_streams_of_others_alone(server_url: str) -> None:
    asked = {"prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = httpx.post(f"{server_url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]
    pieces = []
    nonsense = [
        ("/v1/completions", b"{"),
        ("/v1/completions", b"[" * 100_000),
        ("/v1/completions", b'{"prompt": ""}'),
        ("/v1/completions", b'{"prompt": [99999999]}'),
        ("/v1/completions", b'{"prompt": "a", "logit_bias": {"1": 1000}}'),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": -9223372036854775807}'),
        ("/generate", b'{"inputs": "", "parameters": {}}'),
        ("/generate", b'{"inputs": "a", "parameters": {"temperature": 0}}'),
        ("/v1/chat/completions", b'{"messages": [{"content": "a"}]}'),
        ("/v1/completions", msgspec.json.encode({"prompt": "a" * 100_000})),
    ]
    with httpx.stream("POST", f"{server_url}/v1/completions", json={**asked, "stream": True}, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                pieces.append(msgspec.json.decode(line.removeprefix("data: "))["choices"][0]["text"])
                if nonsense:
                    path, content = nonsense.pop()
                    headers = {"content-type": "application/json"}
                    reply = httpx.post(server_url + path, content=content, headers=headers, timeout=60)
                    assert reply.status_code in (400, 422), (path, content[:80], reply.text)
                    assert "Traceback" not in reply.text
    assert not nonsense
    assert "".join(pieces) == alone
    assert httpx.get(f"{server_url}/health", timeout=60).status_code == 200


def test_a_megabyte_of_one_letter_is_answered_in_bounded_time(server_url: str) -> None:
    reply = httpx.post(f"{server_url}/v1/completions", json={"prompt": "a" * 1_000_000}, timeout=PATIENCE_S)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
