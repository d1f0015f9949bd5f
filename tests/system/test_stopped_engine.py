"""The real server whose engine stands still: what waits for it is bounded, and the memory comes back."""

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from real_server import RunningServer, run_server
from served_app import PATIENCE_S, request

BODY = request("/v1/completions", {"prompt": "x" * 1_000_000, "max_tokens": 1})


def engine_of(server: RunningServer) -> int:
    """The process with the model: of the front's children the largest."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(map(int, children), key=memory_mib)


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


def waiting(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    return float(re.findall(r"^tgi_queue_size (\S+)$", text, re.MULTILINE)[0])


async def ask(url: str, replies: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    try:
        writer.write(BODY)
        await writer.drain()
        replies.append(await reader.readuntil(b"\r\n\r\n"))
    finally:
        writer.transport.abort()


async def three_hundred(url: str) -> list[bytes]:
    """The heads of the replies to as many bodies of 1 MB, of those that were not taken."""
    replies: list[bytes] = []
    async with asyncio.timeout(PATIENCE_S):
        tasks = [asyncio.create_task(ask(url, replies)) for _ in range(300)]
        while await asyncio.to_thread(waiting, url) + len(replies) < len(tasks):
            pass  # each look is a request that takes its time
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return replies


def test_bodies_for_a_stopped_engine_are_refused_in_time_and_their_memory_comes_back() -> None:
    with run_server("--gguf-engine=llama.cpp", "--max-model-len=512", "--stuck-after=600") as server:
        engine, front = engine_of(server), server.process.pid
        before_mib = memory_mib(front)
        os.kill(engine, signal.SIGSTOP)
        try:
            replies = asyncio.run(three_hundred(server.url))
            assert all(head.startswith(b"HTTP/1.1 429 ") for head in replies)
            assert all(int(re.findall(rb"retry-after: (\d+)", head)[0]) >= 1 for head in replies)
            assert 200 < len(replies) < 300
            deadline = time.monotonic() + PATIENCE_S
            while waiting(server.url):
                assert time.monotonic() < deadline
            assert memory_mib(front) < before_mib + 64
        finally:
            os.kill(engine, signal.SIGCONT)
        asked = {"prompt": "Hello", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=PATIENCE_S).status_code == 200
