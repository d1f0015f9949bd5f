"""The load generator's parts: what they read from a socket and what they make of the numbers."""

import asyncio
import json
from pathlib import Path

import pytest

from bench import driving, report
from bench.compare_earlier import EARLIER, METRICS, NOW, judged
from bench.sse import ChunkedDecoder, EventParser, RequestFailed, read_events, stream
from bench.stats import BARS, Bar, Sample, judge, paired_ratios, summarise
from bench.workloads import Target, prose, run_chat, run_streams

pytestmark = pytest.mark.quick

# As servers send them: \n or \r\n, a comment as a ping, an event name, a space after the colon or none.
RECORDED = (
    b": ping - 2026-01-01\r\n\r\n"
    b'data: {"choices":[{"text":"One","index":0}]}\r\n\r\n'
    b'event: message\ndata:{"choices":[{"text":" t\\r\\nwo \xf0\x9f\x99\x82","index":0}]}\n\n'
    b"data: [DONE]\n\n"
)
EVENTS = [
    b'{"choices":[{"text":"One","index":0}]}',
    '{"choices":[{"text":" t\\r\\nwo 🙂","index":0}]}'.encode(),
    b"[DONE]",
]


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_split(step: int) -> None:
    parser = EventParser()
    found = [event for i in range(0, len(RECORDED), step) for event in parser.feed(RECORDED[i : i + step])]
    assert found == EVENTS


@pytest.mark.parametrize("size", [1, 5, 300])
@pytest.mark.parametrize("step", [1, 4, 1000])
def test_chunks_are_undone_however_the_bytes_are_split(size: int, step: int) -> None:
    decoder, sent = ChunkedDecoder(), chunked(RECORDED, size)
    assert b"".join(decoder.feed(sent[i : i + step]) for i in range(0, len(sent), step)) == RECORDED
    assert decoder.is_finished


def event(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_time_to_first_token_counts_from_the_request_to_the_first_text() -> None:
    answer = read_events(
        10.0,
        [
            (10.5, event(choices=[{"delta": {"role": "assistant", "content": ""}}])),
            (11.0, event(choices=[{"delta": {"content": "a"}}])),
            (11.2, event(choices=[{"delta": {"content": "b"}}])),
            (11.6, event(choices=[{"delta": {}, "finish_reason": "stop"}])),
        ],
    )
    assert answer.ttft_s == pytest.approx(1.0)
    assert answer.tpot_s == pytest.approx(0.2)
    assert answer.done_s == 11.6


def test_tokens_are_counted_by_the_servers_usage_when_it_sends_one() -> None:
    usage = {"completion_tokens": 5, "prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}
    answer = read_events(
        0.0,
        [
            (1.0, event(choices=[{"text": "a"}], usage=None)),
            (3.0, event(choices=[{"text": "bcde"}])),
            (3.1, event(choices=[], usage=usage)),
            (3.1, b"[DONE]"),
        ],
    )
    assert (answer.num_tokens, answer.prompt_tokens, answer.cached_tokens) == (5, 40, 32)
    assert answer.tpot_s == pytest.approx(0.5)


def test_an_error_event_fails_the_measurement() -> None:
    with pytest.raises(RequestFailed, match="out of cache"):
        read_events(0.0, [(1.0, event(error={"message": "out of cache"}))])


def test_a_stream_without_text_fails_the_measurement() -> None:
    with pytest.raises(RequestFailed, match="without any text"):
        read_events(0.0, [(1.0, b"[DONE]")])


def test_the_largest_gap_is_that_of_the_waits_which_ended_later() -> None:
    answer = read_events(0.0, [(t, event(choices=[{"text": "x"}])) for t in (1.0, 9.0, 9.5, 12.0, 12.5)])
    assert answer.largest_gap_s(after_s=10.0) == pytest.approx(2.5)
    assert answer.largest_gap_s(after_s=20.0) == 0.0


class ScriptedServer:
    """Answers every POST with the same bytes and keeps the bodies it was sent."""

    def __init__(self, reply: bytes) -> None:
        self.reply = reply
        self.bodies: list[dict[str, object]] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.split("content-length: ")[1].split("\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(size)))
        writer.write(self.reply)
        await writer.drain()
        writer.close()


def streamed(*texts: str) -> bytes:
    events = [event(choices=[{"text": text}]) for text in texts] + [b"[DONE]"]
    body = b"".join(b"data: " + data + b"\n\n" for data in events)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body, 11)


async def test_a_request_asks_for_a_stream_with_usage() -> None:
    server = ScriptedServer(streamed("Hello", " there"))
    async with server as url:
        answer = await stream(url, "/v1/completions", {"prompt": "Hi"})
    assert answer.text == "Hello there"
    assert server.bodies == [{"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}}]


async def test_a_refused_request_fails_with_what_the_server_said() -> None:
    async with ScriptedServer(b"HTTP/1.1 400 Bad Request\r\n\r\nprompt: too long") as url:
        with pytest.raises(RequestFailed, match="status 400: prompt: too long"):
            await stream(url, "/v1/completions", {})


async def test_a_connection_that_closes_before_the_answer_fails_the_measurement() -> None:
    async with ScriptedServer(b"") as url:
        with pytest.raises(RequestFailed, match="closed before the answer was complete"):
            await stream(url, "/v1/completions", {})


async def test_a_server_that_is_gone_fails_the_measurement() -> None:
    async with ScriptedServer(b"") as url:
        pass
    with pytest.raises(RequestFailed, match="nothing answers at http://127"):
        await stream(url, "/v1/completions", {})


async def test_streams_are_sent_as_many_different_prompts() -> None:
    server = ScriptedServer(streamed("a", "b", "c"))
    async with server as url:
        metrics = await run_streams(Target("server", url, None, {"extra": 1}), "salt", 4)
    assert len({str(body["prompt"]) for body in server.bodies}) == 4
    assert all(body["extra"] == 1 for body in server.bodies)
    assert metrics["tokens"] == 12


async def test_the_second_turn_of_the_chat_repeats_the_first_with_its_answer() -> None:
    server = ScriptedServer(streamed("A letter", " from home"))
    async with server as url:
        await run_chat(Target("server", url, None, {}), "salt")
    first, second = (body["messages"] for body in server.bodies)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": "A letter from home"}


def test_prose_is_the_same_for_the_same_salt_and_differs_from_the_first_words_on_otherwise() -> None:
    assert prose("a", 100) == prose("a", 100)
    assert prose("a", 100)[:20] != prose("b", 100)[:20]


def sample(server: str, index: int, value: float, scenario: str = "1 stream") -> Sample:
    return Sample(server, scenario, index, {"decode_tokens_per_s": value})


def test_the_summary_holds_median_and_range() -> None:
    found = summarise([sample("tightrope", i, value) for i, value in enumerate([4.0, 1.0, 100.0])])
    assert found == {"1 stream": {"tightrope": {"decode_tokens_per_s": {"median": 4.0, "min": 1.0, "max": 100.0}}}}


def test_a_ratio_pairs_the_measurements_of_one_round() -> None:
    samples = [
        *(sample("ours", i, value) for i, value in enumerate([10.0, 20.0, 30.0])),
        *(sample("theirs", i, value) for i, value in enumerate([10.0, 10.0])),
        sample("ours", 0, 1.0, scenario="8 streams"),
    ]
    assert paired_ratios(samples, "1 stream", "decode_tokens_per_s", "ours", "theirs") == [1.0, 2.0]


@pytest.mark.parametrize(("ours", "met"), [(94.9, False), (95.0, True), (120.0, True)])
def test_a_bar_is_met_from_its_value_on(ours: float, met: bool) -> None:
    samples = [sample("tightrope", 0, ours), sample("llama.cpp server", 0, 100.0)]
    [verdict] = judge(samples, BARS)
    assert verdict["value"] == pytest.approx(ours / 100)
    assert verdict["met"] is met


def test_a_bar_without_a_peer_is_judged_by_its_own_value() -> None:
    bar = Bar("sooner", "growing chat", "speedup", 10.0)
    samples = [Sample("tightrope", "growing chat", i, {"speedup": value}) for i, value in enumerate([9.0, 11.0, 12.0])]
    [verdict] = judge(samples, [bar])
    assert (verdict["value"], verdict["min"], verdict["max"], verdict["met"]) == (11.0, 9.0, 12.0, True)


def test_driving_llama_cpp_is_held_to_its_server_round_by_round_and_to_gaps_that_somebody_minds() -> None:
    def row(server: str, number: int, tokens_per_s: float, gap_ms: float) -> Sample:
        return Sample(server, "8 streams", number, {"tokens_per_s": tokens_per_s, "largest_gap_ms": gap_ms})

    rounds = [(100.0, 250.0, 80.0, 60.0), (90.0, 600.0, 100.0, 500.0), (99.0, 150.0, 100.0, 500.0)]
    samples = [
        row(server, number, *values)
        for number, (ours, our_gap, theirs, their_gap) in enumerate(rounds)
        for server, values in ((driving.OURS, (ours, our_gap)), (driving.THEIRS, (theirs, their_gap)))
    ]
    speed, gap = driving.verdicts(samples)
    assert (speed["value"], speed["min"], speed["max"], speed["met"]) == (0.99, 0.9, 1.25, False)
    assert gap["value"] == pytest.approx(250 / 300)
    assert gap["max"] == pytest.approx(600 / 500)
    assert gap["met"]


def _runs(server: str, *values: float) -> list[list[Sample]]:
    """A run for each value, with that value for everything that is compared."""
    metrics = {scenario: dict.fromkeys(names, 0.0) for scenario, names in METRICS.items()}
    return [
        [Sample(server, scenario, 0, dict.fromkeys(names, value)) for scenario, names in metrics.items()]
        for value in values
    ]


@pytest.mark.parametrize(
    ("earlier", "now", "slower", "allowed"),
    [
        ((100, 100, 100), (98, 98, 98), 100 / 98 - 1, 0.03),
        ((100, 100, 100), (96, 90, 99), 100 / 96 - 1, 0.03),
        ((95, 100, 105), (92, 92, 92), 100 / 92 - 1, 0.10),
    ],
)
def test_slower_than_an_earlier_checkout_is_what_its_own_runs_do_not_explain(
    earlier: tuple[float, ...], now: tuple[float, ...], slower: float, allowed: float
) -> None:
    runs = [[*a, *b] for a, b in zip(_runs(EARLIER, *earlier), _runs(NOW, *now), strict=True)]
    speeds = next(row for row in judged(runs) if row["metric"] == "tokens_per_s")
    assert speeds["slower"] == pytest.approx(slower)
    assert speeds["allowed"] == pytest.approx(allowed)
    assert speeds["met"] is (slower <= allowed)
    times = next(row for row in judged(runs) if row["metric"] == "first_ttft_ms")
    assert times["slower"] < 0, "a shorter time is no slower"


@pytest.mark.plain
def test_results_are_written_with_command_versions_machine_and_no_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["/home/someone/tightrope/bench/load.py", "/models/small.gguf", "--rounds", "2"])
    written = json.loads(report.write("try", {"speed": 1.5}).read_text())
    assert written["command"] == "python -m bench.load small.gguf --rounds 2"
    assert written["results"] == {"speed": 1.5}
    assert {"command", "date", "versions", "machine", "results"} == set(written)
    assert {"cpu", "cores", "memory_gib"} <= set(written["machine"])
    assert "someone" not in json.dumps(written)
    assert (report.known("try"), report.known("another")) == ({"speed": 1.5}, {})


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("/home/bench/tightrope/bench/rope.py", "bench.rope"),
        ("/home/someone/tightrope/bench/gpu/__main__.py", "bench.gpu"),
        ("/home/someone/tightrope/bench/gpu/listing/__main__.py", "bench.gpu.listing"),
        ("bench/gpu/listing.py", "bench.gpu.listing"),
    ],
)
def test_the_command_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch, program: str, module: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "--arch", "86"])

    assert report.environment()["command"] == f"python -m {module} --arch 86"


def test_kept_results_name_their_command_versions_and_machine() -> None:
    kept = sorted(report.RESULTS.glob("*.json"))
    assert kept
    for path in kept:
        found = json.loads(path.read_text())
        assert {"command", "date", "versions", "machine", "results"} == set(found), path.name
        assert found["command"].startswith("python -m bench."), path.name
        assert "/home/" not in path.read_text(), path.name
