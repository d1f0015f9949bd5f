"""The soak and the overload: what counts as a fault, how memory's growth is told, and what is sent."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest
from fake_api import api
from real_server import run_server

from bench import overload, soak
from bench.asks import KINDS, Ask
from bench.bad_bodies import BAD_BODIES
from bench.crowd import OWED, Crowd, Rest
from bench.load_process import Exchange, Trial
from bench.outcomes import Kill, Outcome, by_kind, faults, judged, perform, recoveries_s
from bench.served import Stopped, last_lines_of_tracebacks
from bench.small_models import LAYERS, WINDOW, write_adapter, write_model
from bench.soak_plot import draw
from bench.sse import Reply, exchange
from bench.watch import ProcessUse, Reading, columns, engine_growth, front_growth, growth, line, lives, read, verdict
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings

pytestmark = pytest.mark.quick

# ---- memory ----


def reading(requests: int, front: float = 50.0, engine: float | None = 300.0, pid: int = 7) -> Reading:
    held = None if engine is None else ProcessUse(pid, engine, 4, 9)
    return Reading(requests / 10, requests, ProcessUse(1, front, 17, 2), held, 10.0)


def test_growth_is_told_for_a_thousand_requests() -> None:
    assert growth([(n, 40 + 2 * n / 1000) for n in range(0, 6000, 100)]) == pytest.approx(2.0)
    assert growth([(n, 40.0) for n in range(0, 6000, 100)]) == 0


def test_what_single_requests_hold_for_a_moment_is_no_growth() -> None:
    draw = random.Random(0)
    assert growth([(n, 40.0 + 30 * (draw.random() < 0.2)) for n in range(0, 6000, 100)]) == 0


def test_growth_is_unknown_with_few_requests_or_few_readings() -> None:
    assert growth([(1000 * n, 1.0) for n in range(8)]) is None
    assert growth([(5, 1.0)] * 30) is None
    assert growth([(n, 1.0) for n in range(100)]) is None
    assert engine_growth([reading(0)], 0) is None


def test_each_engine_is_judged_by_itself_and_after_its_warm_up() -> None:
    first = [reading(n, engine=100.0 + n, pid=7) for n in range(0, 1000, 50)]
    away = [reading(1000, engine=None)]
    second = [reading(n, engine=min(n, 1500), pid=8) for n in range(1000, 3000, 50)]

    found = lives([*first, *away, *second])

    assert found == [first, second]
    assert engine_growth(second, 500) == 0
    assert (engine_growth(second, 0) or 0) > 100
    assert engine_growth(first, 0) == pytest.approx(1000)


def test_the_front_is_judged_with_its_helpers() -> None:
    grown = [replace(reading(n), others_mib=n / 1000) for n in range(0, 3000, 100)]
    assert front_growth(grown) == pytest.approx(1.0)


def test_a_value_that_could_not_be_measured_misses_its_bar() -> None:
    assert [verdict("x", value, 1.0)["met"] for value in (0.5, 1.0, 1.1, None)] == [True, True, False, False]
    assert line(verdict("x", None, 1.0)) == "x: not measured (bar: 1, missed)"


@pytest.mark.plain
def test_a_process_without_children_is_read_as_a_front_without_an_engine() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is up
        found = read(process.pid, 1.5, 3)
        process.communicate(b"\n")
    assert found is not None
    assert (found.at_s, found.requests, found.engine) == (1.5, 3, None)
    assert found.front.mib > 1
    assert found.front.descriptors > 2
    assert found.front.threads >= 1


# ---- faults ----


def reply(status: int, body: bytes = b"", events: Sequence[bytes] = (), is_whole: bool = True) -> Reply:
    return Reply(0, 0, status, 0, {}, body, [(0.0, event) for event in events], is_whole)


PIECE, ERROR = b'{"choices":[{"text":"a"}]}', b'{"error":{"message":"died"}}'
STREAM, WHOLE, REFUSAL = (Ask("x", "/", b"", expected) for expected in ("stream", "whole", "refusal"))
LEAVES = Ask("x", "/", b"", "nothing", hang_up_events=1)
TWO = Ask("x", "/", b"", check=lambda answer: len(answer["choices"]) == 2)


@pytest.mark.parametrize(
    ("ask", "found", "end"),
    [
        (STREAM, reply(200, events=[PIECE, b"[DONE]"]), "answered"),
        (STREAM, reply(200, events=[b'{"generated_text":null}', b'{"generated_text":""}']), "answered"),
        (STREAM, reply(200, events=[PIECE, ERROR]), "failed"),
        (STREAM, reply(200, events=[PIECE]), "cut"),
        (STREAM, reply(200, events=[PIECE], is_whole=False), "cut"),
        (STREAM, reply(200), "cut"),
        (WHOLE, reply(200, b"{}"), "answered"),
        (WHOLE, reply(200, b"{", is_whole=False), "cut"),
        (WHOLE, reply(503, b"{}"), "failed"),
        (WHOLE, reply(424, b"{}"), "failed"),
        (WHOLE, reply(429, b"{}"), "refused"),
        (TWO, reply(200, b'{"choices": [1, 2]}'), "answered"),
        (TWO, reply(200, b'{"choices": [1]}'), "wrong"),
        (TWO, reply(200, b"[]"), "wrong"),
        (TWO, reply(200, b'{"choices"'), "wrong"),
        (LEAVES, reply(200, events=[PIECE], is_whole=False), "left"),
        (LEAVES, reply(200, events=[PIECE, b"[DONE]"]), "answered"),
        (REFUSAL, reply(400, b"{}"), "refused"),
        (REFUSAL, reply(200, b"{}"), "answered"),
    ],
)
def test_an_exchange_ends_in_one_of_few_ways(ask: Ask, found: Reply, end: str) -> None:
    assert judged(ask, found) == end


def outcome(end: str, expected: str = "stream", begin_s: float = 10.0, end_s: float = 11.0) -> Outcome:
    return Outcome("chat", expected, begin_s, end_s, end, 200)  # type: ignore[arg-type]  # one of the ends


@pytest.mark.parametrize(
    ("end", "expected", "alone", "beside_a_kill"),
    [
        ("answered", "stream", False, False),
        ("failed", "stream", True, False),
        ("cut", "stream", True, True),
        ("lost", "whole", True, True),
        ("wrong", "whole", True, True),
        ("refused", "whole", True, True),
        ("refused", "refusal", False, False),
        ("answered", "refusal", True, True),
        ("failed", "refusal", True, False),
        ("left", "nothing", False, False),
        ("answered", "nothing", False, False),
        ("failed", "nothing", True, False),
    ],
)
def test_a_kill_excuses_errors_and_nothing_else(end: str, expected: str, alone: bool, beside_a_kill: bool) -> None:
    found = outcome(end, expected)
    assert bool(faults([found], [])) is alone
    assert bool(faults([found], [Kill(10.5, "serving", 15.0)])) is beside_a_kill


@pytest.mark.parametrize(
    ("begin_s", "end_s", "is_fault"), [(1, 9, True), (9, 10, False), (15, 16, False), (17, 18, True)]
)
def test_a_kill_excuses_errors_from_its_moment_until_the_server_is_well(
    begin_s: float, end_s: float, is_fault: bool
) -> None:
    found = outcome("failed", begin_s=begin_s, end_s=end_s)
    assert bool(faults([found], [Kill(10.0, "serving", 15.0)])) is is_fault


def test_the_time_to_come_back_counts_from_the_last_of_several_kills() -> None:
    kills = [Kill(0, "serving", 9), Kill(4, "loading", 9), Kill(20, "serving", 26), Kill(30, "serving")]
    assert recoveries_s(kills) == [5, 6]


def test_all_kinds_of_bad_input_are_counted_together() -> None:
    found = [replace(outcome("refused", "refusal"), kind=f"bad: {name}") for name in ("a", "b")]
    assert by_kind([*found, outcome("answered")]) == {"bad": {"refused": 2}, "chat": {"answered": 1}}


def test_a_traceback_is_told_by_its_last_line_alone() -> None:
    log = (
        "INFO x: fine\nTraceback (most recent call last):\n"
        '  File "/home/someone/x.py", line 1, in <module>\n    f()\n    ~^^\n'
        "ValueError: no\nINFO x: fine\n"
    )
    assert last_lines_of_tracebacks(log * 2) == ["ValueError: no"] * 2


# ---- verdicts ----


def clean() -> soak.Found:
    rests = [Rest(dict.fromkeys(OWED, 0.0), reading(n)) for n in (1000, 5000)]
    return soak.Found(
        readings=[reading(n) for n in range(0, 5000, 50)],
        warm_s=100.0,
        outcomes=[outcome("answered"), outcome("refused", "refusal"), outcome("left", "nothing")],
        kills=[Kill(50.0, "serving", 58.0)],
        before=rests[0],
        after=rests[1],
        stopped=Stopped(0, [], []),
        tracebacks=[],
    )


def missed(found: soak.Found) -> set[str]:
    return {str(bar["name"]) for bar in soak.verdicts(found) if not bar["met"]}


def test_a_server_that_stands_meets_every_bar() -> None:
    assert missed(clean()) == set()


def after(**changes: int) -> Rest:
    rest = clean().after
    assert rest.reading.engine is not None
    return replace(rest, reading=replace(rest.reading, engine=replace(rest.reading.engine, **changes)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"outcomes": [outcome("cut")]}, "streams and answers that were cut short"),
        ({"outcomes": [outcome("lost")]}, "requests without an answer"),
        ({"outcomes": [outcome("failed")]}, "errors and refusals that no kill explains"),
        ({"outcomes": [outcome("wrong")]}, "answers that are not what was asked for"),
        ({"outcomes": [outcome("answered", "refusal")]}, "bad input that was not refused with 4xx"),
        (
            {"readings": [reading(n, front=n / 500) for n in range(0, 5000, 50)]},
            "front, growth in MiB per 1,000 requests",
        ),
        (
            {"readings": [reading(n, engine=n / 100) for n in range(0, 5000, 50)]},
            "last engine, growth in MiB per 1,000 requests",
        ),
        (
            {"readings": [reading(n, engine=None) for n in range(0, 5000, 50)]},
            "last engine, growth in MiB per 1,000 requests",
        ),
        ({"after": after(descriptors=5)}, "descriptors more at rest after than before"),
        ({"after": after(threads=10)}, "threads more at rest after than before"),
        (
            {"after": replace(clean().after, gauges={**dict.fromkeys(OWED, 0.0), "cached tokens in use": 256.0})},
            "cached tokens in use, answers running or waiting at rest",
        ),
        ({"kills": [Kill(1.0, "serving", 30.0)]}, "seconds until a killed engine serves again, the longest but 1 %"),
        ({"kills": [Kill(1.0, "serving", 2.0), Kill(9.0, "loading")]}, "kills after which none came back"),
        ({"tracebacks": ["ValueError: no"]}, "tracebacks in the log"),
        ({"stopped": Stopped(1, [], [])}, "exit status"),
        ({"stopped": Stopped(None, [], [])}, "exit status"),
        ({"stopped": Stopped(0, ["-m tightrope.processes"], [])}, "processes and temporary files left"),
        ({"stopped": Stopped(0, [], ["a.gguf"])}, "processes and temporary files left"),
    ],
)
def test_each_fault_misses_its_own_bar(changes: dict[str, object], name: str) -> None:
    assert missed(replace(clean(), **changes)) == {name}  # type: ignore[arg-type]  # fields of Found


def test_results_are_json_and_a_picture_is_drawn(tmp_path: Path) -> None:
    found = replace(clean(), readings=[reading(n, engine=None if n == 200 else 9.0) for n in range(0, 5000, 50)])
    bars = soak.verdicts(found)
    written = json.loads(json.dumps(soak.results(found, bars, {"minutes": 1})))
    assert written["readings"]["engine_mib"][:6] == [9.0, 9.0, 9.0, 9.0, None, 9.0]
    assert written["last_engine"]["requests"] == 4950
    assert columns([]) == {}
    picture = draw(found.readings, [50.0], "kills", bars, "caption", tmp_path / "soak.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---- what is sent ----


@pytest.mark.plain
async def test_every_bad_body_is_refused() -> None:
    async with api() as http:
        for name, bad in BAD_BODIES.items():
            headers = {"content-type": "application/json"} | {k.lower(): v for k, v in bad.headers.items()}
            status = (await http.post(bad.path, content=bad.payload, headers=headers)).status_code
            assert 400 <= status < 500, (name, status)


def test_the_same_seed_asks_the_same() -> None:
    for name, (_, make) in KINDS.items():
        if name != "guest adapter":  # whose names are never used twice
            assert make(random.Random(1))[0].payload == make(random.Random(1))[0].payload
        for ask in make(random.Random(2)):
            assert ask.missing or ask.payload is None or ask.expected == "refusal" or json.loads(ask.payload)


async def test_a_body_that_ends_too_early_is_cut_and_a_server_that_is_gone_loses_the_request() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nRetry-After: 3\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        found = await exchange(url, "/", b"{}")
        cut = await perform(url, WHOLE, 0.0)
    gone = await perform(url, WHOLE, 0.0)
    assert (found.status, found.body, found.is_whole, found.headers["retry-after"]) == (200, b"{}", False, "3")
    assert cut.end == "cut"
    assert (gone.end, "nothing answers" in gone.text) == ("lost", True)


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_gone_for_the_server() -> None:
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = await reader.read()  # up to the end of the connection
        writer.close()
        received.set_result(sent)

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        left = await perform(url, Ask("x", "/", b"{}", "nothing", hang_up_s=0.1, missing=5), 0.0)
        sent = await received
    assert left.end == "left"
    assert b"Content-Length: 7\r\n" in sent
    assert sent.endswith(b"\r\n\r\n{}")


# ---- the tiny model, and a crowd around a real server ----


@pytest.mark.plain
def test_an_adapter_changes_what_the_tiny_model_says(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    settings = ModelSettings(
        max_model_len=256,
        cache=CacheSettings(tokens=512, dtype="f16"),
        adapters={"mine": str(write_adapter(model, tmp_path / "adapter", 1))},
    )
    with closing(HFBackend(model, settings, lambda _: None)) as backend:
        ids = backend.tokenizer.encode("hello", parse_special=False, is_start=True)
        found = []
        for adapter in (None, "mine"):
            assert backend.kv.open(0, ids, str(adapter)).num_tokens == 0
            assert backend.kv.reserve(0, len(ids))
            found.append(backend.forward([Chunk(0, ids, 0, "last", adapter)]).clone())
            backend.kv.close(0, keep=False)
        assert backend.card.trained_len == WINDOW
    assert len(ids) == 5, "a token for each byte"
    assert LAYERS > 1
    assert not found[0].equal(found[1])


@pytest.mark.slow
async def test_a_crowd_finds_no_fault_in_a_server_whose_engine_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.crowd.SETTLE_S", 0.0)
    model = write_model(tmp_path / "model")
    options = await asyncio.to_thread(soak.server_options, model, tmp_path / "adapters")
    with run_server(str(model), *options) as server:
        crowd = Crowd(server.url, server.process.pid, clients=4, seed=1)
        await crowd.busy(1.0, crowd.kill_once)
        rest = await crowd.rest()
    assert faults(crowd.outcomes, crowd.kills) == []
    assert [kill.was for kill in crowd.kills] == ["serving"]
    assert len(recoveries_s(crowd.kills)) == 1
    assert {name: rest.gauges[name] for name in OWED} == dict.fromkeys(OWED, 0.0)
    assert rest.reading.engine is not None


# ---- overload ----


def trial(end_s: float, status: int = 200, tpot_s: float | None = 0.01, waits_s: float = 0.01) -> Trial:
    return Trial(end_s - 1, end_s - 1 + waits_s, end_s, status, tpot_s if status == 200 else None, True)


def loaded(*more: Trial) -> overload.Found:
    """Two answers a second at plain full load; as many, a little slower, and many refusals at ten times that."""
    plain = [trial(0.5 * n) for n in range(20)]
    many = [trial(10 + 0.5 * n, tpot_s=0.011) for n in range(20)] + [trial(10 + 0.05 * n, 429) for n in range(180)]
    readings = [reading(0), *(replace(reading(n), at_s=float(n)) for n in range(1, 20))]
    return overload.Found(plain, [*many, *more], (0.0, 10.0), (10.0, 20.0), readings, [1.0, 2.0], 0.1)


def missed_bars(found: overload.Found) -> set[str]:
    return {str(bar["name"]) for bar in overload.verdicts(found) if not bar["met"]}


def test_overload_is_told_by_what_was_served_offered_and_refused() -> None:
    numbers = overload.figures(loaded())
    assert numbers["plain_served_per_s"] == 2.0
    assert numbers["served_per_s"] == 2.0
    assert numbers["offered_per_s"] == 20.0
    assert numbers["tpot_ratio"] == pytest.approx(1.1)
    assert numbers["refused_p99_ms"] == pytest.approx(10)
    assert (numbers["front_more_mib"], numbers["engine_more_mib"]) == (0, 0)
    assert missed_bars(loaded()) == set()


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ([trial(15, 503)], "answers with 5xx"),
        ([trial(15, 0)], "requests without a whole answer"),
        ([trial(15, 400)], "other statuses than 200 and 429"),
        ([replace(trial(15, 429), says_when=False)], "refusals without Retry-After"),
        ([trial(15, 429, waits_s=0.2)] * 3, "ms to a refusal, p99"),
        ([trial(15, tpot_s=0.02)] * 30, "time per token over that of plain full load"),
    ],
)
def test_each_fault_under_overload_misses_its_own_bar(more: list[Trial], name: str) -> None:
    assert missed_bars(loaded(*more)) == {name}


def test_memory_that_only_overload_takes_misses_its_bar() -> None:
    found = loaded()
    grown = [replace(r, front=replace(r.front, mib=90.0)) if r.at_s > 15 else r for r in found.readings]
    assert missed_bars(replace(found, readings=grown)) == {"front, MiB beyond plain full load"}


def test_an_overload_without_refusals_is_not_judged_as_met() -> None:
    assert "ms to a refusal, p99" in missed_bars(replace(loaded(), overload=[trial(15)]))


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [overload.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert overload.percentile([7.0], 0.99) == 7
    assert overload.percentile([], 0.99) is None


def exchanged(raw: bytes, size: int) -> Trial:
    """What a request was whose answer came in pieces of so many bytes, one every tenth of a second."""
    exchange = Exchange(10.0, end_s=99.0)
    exchange.pieces = [(10.1 + i / size / 10, raw[i : i + size]) for i in range(0, len(raw), size)]
    return exchange.trial(5.0)


def test_a_refusal_is_told_by_its_head() -> None:
    found = exchanged(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\ncontent-length: 2\r\n\r\n{}", 1000)
    assert (found.begin_s, found.status, found.says_when) == (5.0, 429, True)
    assert found.head_s == pytest.approx(5.1)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_whole_only_with_its_last_chunk(size: int) -> None:
    events = b'data: {"choices":[{"text":"a"}]}\n\n' + b'data: {"choices":[{"text":"b"}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    raw = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events)
    assert exchanged(raw, size).status == 200
    assert exchanged(raw[:-5], size).status == 0
    assert exchanged(b"", size).status == 0
