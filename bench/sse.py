"""A streaming HTTP client that costs next to nothing: it shares its cores with the server that it measures.

While an answer streams it only splits bytes into events and notes the time of each; JSON is read afterwards.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from urllib.parse import urlsplit


class RequestFailed(Exception):
    """The server answered with an error status or broke off; the message holds what it said."""


class ChunkedDecoder:
    """Undoes `Transfer-Encoding: chunked` on bytes that arrive in pieces of any size."""

    def __init__(self) -> None:
        self.is_finished = False
        self._buffer = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes that `data` completes."""
        self._buffer += data
        body = bytearray()
        while not self.is_finished:
            end = self._buffer.find(b"\r\n")
            if end < 0:
                break
            size = int(self._buffer[:end].split(b";")[0], 16)
            if size == 0:
                self.is_finished = True
            elif len(self._buffer) < end + size + 4:
                break
            else:
                body += self._buffer[end + 2 : end + 2 + size]
                del self._buffer[: end + size + 4]
        return bytes(body)


class EventParser:
    """Splits a stream of server-sent events into the data of each; comments and other fields are left out."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that `data` completes."""
        self._buffer += data.replace(b"\r", b"")  # a CR only ever ends a line: JSON escapes the others
        *events, self._buffer = self._buffer.split(b"\n\n")
        found = []
        for event in events:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found


@dataclass(slots=True)
class Answer:
    """One streamed answer and when its pieces came; times are `time.perf_counter` seconds."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)  # of events that carry text
    text: str = ""
    num_tokens: int = 0  # as the server counts them, else the number of events with text
    prompt_tokens: int = 0  # 0 where the server doesn't say
    cached_tokens: int = 0
    done_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        elapsed_s = max(self.arrivals_s[-1] - self.arrivals_s[0], 1e-9)  # it may all come at once
        return elapsed_s / max(1, self.num_tokens - 1)

    def largest_gap_s(self, after_s: float) -> float:
        """The longest wait between two pieces of text, of the waits that ended after the time `after_s`."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return max((late - early for early, late in pairs if late > after_s), default=0.0)


def read_events(sent_s: float, events: list[tuple[float, bytes]]) -> Answer:
    """Put together the answer of a completion or chat completion from its events and their arrival times.

    Raises RequestFailed on an error event and on a stream without any text.
    """
    answer = Answer(sent_s, done_s=events[-1][0] if events else sent_s)
    for arrived_s, data in events:
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(f"the stream ended with an error: {event['error']}")
        for choice in event.get("choices") or ():
            piece = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content")
            if piece:
                answer.text += piece
                answer.arrivals_s.append(arrived_s)
        if usage := event.get("usage"):
            answer.num_tokens = usage["completion_tokens"]
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if not answer.arrivals_s:
        raise RequestFailed("the stream ended without any text")
    answer.num_tokens = answer.num_tokens or len(answer.arrivals_s)
    return answer


@dataclass(slots=True)
class Reply:
    """What came back for one request; times are `time.perf_counter` seconds."""

    asked_s: float  # before the connection was opened
    sent_s: float
    status: int
    head_s: float  # when status and headers had come
    headers: Mapping[str, str]  # in lower case
    body: bytes = b""
    events: list[tuple[float, bytes]] = field(default_factory=list)  # the data of each in a body of events
    is_whole: bool = False  # the server ended the body where it said that it would, or with [DONE]
    done_s: float = 0.0


async def exchange(
    base_url: str,
    path: str,
    payload: bytes | None,
    headers: Mapping[str, str] = MappingProxyType({}),
    is_enough: Callable[[int], bool] = lambda num_events: False,
    missing: int = 0,
) -> Reply:
    """POST `payload` to `base_url` + `path`, or GET it if that is None, and read what comes back.

    is_enough: asked, whenever bytes have come, whether to hang up after so many events. missing: bytes that the headers
    announce beyond those sent, as of a client that leaves in the middle of its body.
    Raises RequestFailed when nobody listens, and when the connection closes before there is a status.
    """
    url = urlsplit(base_url)
    fields = {"Host": url.netloc, "Connection": "close"}
    if payload is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(payload) + missing)}
    lines = [f"{name}: {value}\r\n" for name, value in (fields | dict(headers)).items()]
    head = f"{'GET' if payload is None else 'POST'} {path} HTTP/1.1\r\n{''.join(lines)}\r\n"
    asked_s = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
    except OSError as error:
        raise RequestFailed(f"nothing answers at {base_url}: {error.strerror or error}") from error
    try:
        sent_s = time.perf_counter()
        writer.write(head.encode() + (payload or b""))
        status, found = _read_head(await reader.readuntil(b"\r\n\r\n"))
        reply = Reply(asked_s, sent_s, status, time.perf_counter(), found)
        await _collect(reader, reply, is_enough)
        return reply
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise RequestFailed("the connection closed before the answer was complete") from error
    finally:
        writer.close()


async def stream(base_url: str, path: str, body: dict[str, object], until: asyncio.Event | None = None) -> Answer:
    """POST `body` to `base_url` + `path` and read the streamed answer to its end, or hang up once `until` is set.

    Raises RequestFailed for any status but 200, for error events, and when the connection closes early.
    """
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    headers = {"Accept": "text/event-stream"}
    is_enough = (lambda num_events: False) if until is None else (lambda num_events: until.is_set())
    reply = await exchange(base_url, path, payload, headers, is_enough)
    if reply.status != 200:
        raise RequestFailed(f"status {reply.status}: {reply.body[:500].decode(errors='replace')}")
    return read_events(reply.sent_s, reply.events)


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status code and headers, in lower case."""
    status_line, *lines = head.decode("latin-1").lower().split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(status_line.split(" ")[1]), {name: value.strip() for name, _, value in pairs}


async def _collect(reader: asyncio.StreamReader, reply: Reply, is_enough: Callable[[int], bool]) -> None:
    """Read the body into `reply`, up to [DONE], its end, or the first bytes after which it is enough."""
    is_chunked = "chunked" in reply.headers.get("transfer-encoding", "")
    length = None if is_chunked or "content-length" not in reply.headers else int(reply.headers["content-length"])
    decoder, parser = ChunkedDecoder(), EventParser()
    body = bytearray()
    is_left = False
    while not (reply.is_whole or is_left):
        data = await reader.read(65536)
        now_s = time.perf_counter()
        if not data:  # without a stated length this is how a body ends
            reply.is_whole = not is_chunked and length is None
            break
        piece = decoder.feed(data) if is_chunked else data
        body += piece
        reply.events += [(now_s, event) for event in parser.feed(piece)]
        is_done = bool(reply.events) and reply.events[-1][1] == b"[DONE]"
        reply.is_whole = is_done or decoder.is_finished or (length is not None and len(body) >= length)
        is_left = is_enough(len(reply.events))
    reply.body, reply.done_s = bytes(body), time.perf_counter()
