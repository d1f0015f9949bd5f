"""Replicas behind one front, without Ray: streams that go on elsewhere, drains, adapters, versions, and strangers."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engine_clients import ask, expected, fake_thread, settings, until
from fake_engine import open_fake
from fakes import FakeBackend
from msgspec import structs
from replicas import LOOPBACK, Cluster, cluster, started

from tightrope.backends.settings import ModelSettings
from tightrope.engine.errors import BackendFailed, EngineUnavailable, InvalidRequest, ModelNotFound, Overloaded
from tightrope.engine.process.launch import thread_launcher
from tightrope.engine.process.wire import Alive, Ready
from tightrope.engine.protocol import Engine
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import Delta, GenerateRequest, Span, TextPrompt
from tightrope.server.cluster import link as links
from tightrope.server.cluster.handshake import NotProved, greet_ingress, greet_replica
from tightrope.server.cluster.link import Place
from tightrope.server.cluster.messages import MAX_GREETING_BYTES, encode
from tightrope.server.cluster.pool import Pool

LONG = 600  # So many tokens take the fake engine long enough to be killed meanwhile.


async def answer(engine: Engine, request: GenerateRequest) -> str:
    return "".join([delta.text async for delta in engine.generate(request)])


async def rest(deltas: AsyncGenerator[Delta, None], *begin: Delta) -> str:
    return "".join([*(delta.text for delta in begin), *[delta.text async for delta in deltas]])


async def begun(running: Cluster, request: GenerateRequest) -> tuple[AsyncGenerator[Delta, None], Delta, str]:
    """An answer of which the first tokens are there, and the replica that writes it."""
    deltas = running.pool.generate(request)
    while (first := await anext(deltas)).read is not None:
        pass
    place = running.place_of(request.request_id)
    assert place is not None
    return deltas, first, place


# ---- answers ----


async def test_requests_go_to_the_replica_that_has_least_to_do_and_all_get_their_answers():
    async with cluster("a", "b", launch=fake_thread) as running:
        held = [await begun(running, ask(f"r{i}", f"prompt {i}", LONG)) for i in range(4)]
        assert sorted(place for _, _, place in held) == ["a", "a", "b", "b"]
        texts = await asyncio.gather(*(rest(deltas, first) for deltas, first, _ in held))
        assert texts == [expected(f"prompt {i}", LONG) for i in range(4)]
        assert (running.pool.num_running, running.pool.num_waiting) == (0, 0)
        assert running.pool.stats.generated_tokens == 4 * LONG


async def test_what_replicas_are_together_is_told_as_of_one_engine():
    async with cluster("a", "b", launch=fake_thread) as running:
        pool = running.pool
        assert pool.info is not None
        assert (pool.info.model_id, pool.info.max_model_len) == ("fake", 1024)
        assert (pool.info.max_num_seqs, pool.info.cache_tokens) == (2 * 4, 2 * 4096)
        assert (pool.is_healthy, pool.load_share, pool.restarts, pool.retry_after_s) == (True, 1.0, 0, 1)
        run = await pool.tokenize(TextPrompt((Span("ab"),), add_bos=False))
        assert run.ids == [97, 98]
        assert await pool.detokenize(run.ids) == "ab"


async def test_a_session_stays_on_its_replica():
    async with cluster("a", "b", "c", launch=fake_thread) as running:
        places = set()
        for turn in range(6):
            request = structs.replace(ask(f"r{turn}", "x" * 32 + str(turn), 100), session="chat 7")
            deltas, first, place = await begun(running, request)
            places.add(place)
            await rest(deltas, first)
        assert len(places) == 1


async def test_a_chat_without_a_name_stays_where_it_was_though_it_loses_its_beginning():
    async with cluster("a", "b", "c", launch=fake_thread) as running:
        await answer(running.pool, ask("first", "Something is told of, so that tokens are asked for.", 4))
        places, chat = set(), "The chat so far, which fills its window, and of which the oldest is left out. " * 3
        for turn in range(6):
            deltas, first, place = await begun(running, ask(f"r{turn}", chat, 20))
            chat = chat[30:] + await rest(deltas, first) + f" And then, for the {turn}. time?"
            places.add(place)
        assert len(places) == 1


async def test_a_prompt_goes_where_its_beginning_is_cached():
    async with cluster("a", "b", "c", launch=fake_thread) as running:
        chat = "The chat so far, which is long enough to be told of. " * 4
        deltas, first, place = await begun(running, ask("r0", chat, 20))
        text = await rest(deltas, first)
        for turn in range(1, 5):
            chat += text + f" And then, for the {turn}. time?"
            deltas, first, again = await begun(running, ask(f"r{turn}", chat, 20))
            text = await rest(deltas, first)
            assert first.prompt is not None
            assert again == place
            assert first.prompt.num_cached > 0.9 * (len(chat) - 60)


async def test_a_cancelled_request_is_cancelled_on_its_replica():
    async with cluster("a", launch=fake_thread) as running:
        deltas, _, _ = await begun(running, ask("r", "forever", LONG))
        await deltas.aclose()
        await until(lambda: running.relays["a"].num_open == 0)
        await until(lambda: running.pool.stats.cancelled == 1)


async def test_too_many_requests_are_refused_by_the_sum_of_all_places():
    async with cluster("a", "b", launch=fake_thread, own=settings(max_waiting=1)) as running:
        held = [await begun(running, ask(f"r{i}", str(i), LONG)) for i in range(8)]
        running.pool.check_room()
        with pytest.raises(Overloaded, match="the limit is 1"):
            running.pool.check_room(1)
        for deltas, _, _ in held:
            await deltas.aclose()


async def test_a_request_that_a_replica_refuses_is_refused_in_its_words():
    async with cluster("a", launch=fake_thread) as running:
        with pytest.raises(InvalidRequest, match="maximum context length is 1024"):
            await answer(running.pool, ask("r", "x" * 2000))
        with pytest.raises(ModelNotFound):
            await answer(running.pool, structs.replace(ask("r", "x"), adapter="none"))


# ---- replicas that go ----


async def test_when_a_replica_dies_in_mid_answer_another_goes_on_with_it():
    async with cluster("a", "b") as running:
        for n, number in ((1, 0), (2, 1)):
            deltas, first, place = await begun(running, ask(f"r{number}", "tell me", LONG, n=n))
            running.kill(place)
            texts = [first.text if first.index == i else "" for i in range(n)]
            finishes = 0
            async for delta in deltas:
                texts[delta.index] += delta.text
                finishes += delta.finish is not None
            assert (texts, finishes) == ([expected("tell me", LONG)] * n, n)
            await running.usable("a", "b")
        assert running.pool.restarts == 2


@pytest.mark.slow
async def test_a_request_that_kills_replicas_kills_two_at_most():
    async with cluster("a", "b", "c") as running:
        with pytest.raises(BackendFailed, match="2 replicas died"):
            await answer(running.pool, ask("r", "crash", 20))
        await running.usable("a", "b", "c")
        assert running.pool.restarts == 2
        assert await answer(running.pool, ask("s", "hello")) == expected("hello")


async def test_while_no_replica_is_there_what_was_begun_waits_and_newcomers_are_told():
    async with cluster("a") as running:
        deltas, first, _ = await begun(running, ask("r", "wait for it", LONG))
        running.kill("a")
        await running.usable()
        with pytest.raises(EngineUnavailable, match="no replica is there"):
            await answer(running.pool, ask("s", "hello"))
        assert not running.pool.is_healthy
        assert running.pool.retry_after_s >= 1
        assert await rest(deltas, first) == expected("wait for it", LONG)


async def test_a_text_to_be_tokenized_is_asked_of_another_replica_when_one_goes():
    async with cluster("a", "b") as running:
        asked = asyncio.gather(*(running.pool.tokenize(TextPrompt((Span("ab" * 20_000),))) for _ in range(20)))
        await asyncio.sleep(0)
        running.kill("a")
        assert {len(run) for run in await asked} == {40_001}


async def test_a_replica_that_drains_gets_nothing_new_and_ends_what_it_writes():
    async with cluster("a", "b", launch=fake_thread) as running:
        deltas, first, place = await begun(running, ask("r", "drain", LONG))
        draining = asyncio.create_task(running.relays[place].drain(60.0))
        (other,) = {"a", "b"} - {place}
        await running.usable(other)
        for number in range(4):
            _, _, elsewhere = await begun(running, ask(f"s{number}", "hello", LONG))
            assert elsewhere == other
        assert await rest(deltas, first) == expected("drain", LONG)
        await draining
        assert running.pool.restarts == 0


async def test_what_a_draining_replica_has_no_time_to_end_moves_and_is_none_of_its_tries():
    async with cluster("a", "b", "c", launch=fake_thread) as running:
        deltas, first, place = await begun(running, ask("r", "a long one", LONG))
        texts = [first]
        for _ in range(3):
            name = running.place_of("r")
            if name is None or len(running.relays) == 1:
                break
            await running.relays[name].drain(0.0)
            await running.relays.pop(name).close()
            await until(lambda: running.place_of("r") not in (None, name))  # noqa: B023  # It is awaited here.
            texts.append(await anext(deltas))
        assert len(running.relays) == 1
        assert await rest(deltas, *texts) == expected("a long one", LONG)
        assert place not in running.relays


async def test_a_replica_that_ray_takes_off_its_list_gets_nothing_new():
    async with cluster("a", "b", launch=fake_thread) as running:
        deltas, first, place = await begun(running, ask("r", "taken off", LONG))
        (other,) = {"a", "b"} - {place}
        running.watch.set([one for one in running.watch.places if one.name == other])
        await running.usable(other)
        assert await rest(deltas, first) == expected("taken off", LONG)
        await running.relays[place].close()
        await until(lambda: [link.name for link in running.pool.replicas.all] == [other])


async def test_a_replica_that_says_nothing_any_more_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(links, "BEAT_S", 0.02)
    async with cluster("a", launch=fake_thread) as running:
        info = running.pool.info
        assert info is not None

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await greet_ingress(reader, writer, b"secret")
            writer.write(encode(Ready(info, {})))
            await reader.read()  # It hears all, and answers nothing.
            writer.close()

        server = await asyncio.start_server(silent, LOOPBACK, 0)
        running.watch.set([Place("silent", LOOPBACK, server.sockets[0].getsockname()[1], b"secret")])
        await running.usable("silent")
        request = asyncio.create_task(answer(running.pool, ask("r", "hello")))
        await until(lambda: running.pool.restarts > 0)
        await running.add("b", fake_thread)
        monkeypatch.setattr(links, "BEAT_S", 2.0)
        running.watch.set([one for one in running.watch.places if one.name == "b"])
        assert await request == expected("hello")
        server.close()


async def test_a_replica_that_is_away_is_told_of_once_and_again_when_it_is_back(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "tightrope.ingress")
    async with cluster("a", launch=fake_thread) as running:
        info, tries = running.pool.info, 0
        assert info is not None

        async def shy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal tries
            tries += 1
            if tries > 3:
                await greet_ingress(reader, writer, b"secret")
                writer.write(encode(Ready(info, {})))
                await reader.read()
            writer.close()

        server = await asyncio.start_server(shy, LOOPBACK, 0)
        running.watch.set(
            [*running.watch.places, Place("shy", LOOPBACK, server.sockets[0].getsockname()[1], b"secret")]
        )
        await running.usable("a", "shy")
        told = [record.getMessage() for record in caplog.records if "name=shy" in record.getMessage()]
        assert [line.partition(":")[0] for line in told] == ["replica is away", "replica is back"]
        server.close()


# ---- replicas that come ----


async def test_adapters_are_loaded_on_all_replicas_and_on_those_that_come_later(tmp_path: Path):
    own = EngineSettings(model=ModelSettings(adapter_folder=str(tmp_path)))
    (tmp_path / "kept").touch()
    (tmp_path / "gone").touch()
    async with cluster("a", "b", own=own) as running:
        await running.pool.load_adapter("kept", "kept")
        await running.pool.load_adapter("gone", "gone")
        await running.pool.unload_adapter("gone")
        with pytest.raises(InvalidRequest, match="no such file"):
            await running.pool.load_adapter("never", "there")
        assert running.pool.adapters == {"kept": str(tmp_path / "kept")}
        running.kill("a")
        await running.add("c", own=own)
        await running.usable("a", "b", "c")
        assert all(link.exchange.adapters.keys() == {"kept"} for link in running.pool.replicas.all)
        request = structs.replace(ask("s", "hello"), adapter="kept")
        assert await answer(running.pool, request) == expected("hello")


async def test_an_adapter_that_one_replica_refuses_is_on_none(tmp_path: Path):
    (tmp_path / "x").touch()
    (tmp_path / "elsewhere").mkdir()
    other = EngineSettings(model=ModelSettings(adapter_folder=str(tmp_path / "elsewhere")))
    async with cluster(
        "a", launch=fake_thread, own=EngineSettings(model=ModelSettings(adapter_folder=str(tmp_path)))
    ) as c:
        await c.add("b", fake_thread, other)
        await c.usable("a", "b")
        with pytest.raises(InvalidRequest):
            await c.pool.load_adapter("x", "x")
        assert [dict(link.exchange.adapters) for link in c.pool.replicas.all] == [{}, {}]


async def test_another_version_of_the_model_is_not_mixed_in_while_the_first_is_there():
    def other_model(model: ModelSettings, progress: Callable[[float], None]) -> FakeBackend:
        backend = open_fake(model, progress)
        backend.card = replace(backend.card, model_id="another")
        return backend

    async with cluster("a", launch=fake_thread) as running:
        await running.add("new", thread_launcher(other_model))
        await until(lambda: running.link("new").is_up)
        deltas, first, place = await begun(running, ask("r", "hello", LONG))
        assert place == "a"
        await running.usable("a")
        running.watch.set([one for one in running.watch.places if one.name == "new"])
        await running.relays["a"].close()
        with pytest.raises(EngineUnavailable, match="another model"):
            await rest(deltas, first)
        await running.usable("new")
        assert running.pool.info is not None
        assert running.pool.info.model_id == "another"


# ---- strangers, and what is wrong ----


async def test_a_digest_that_is_wrong_costs_time_and_changes_no_text():
    async with cluster("a", "b", launch=fake_thread) as running:
        prompt = "What nobody has computed, whoever says so. " * 4
        deltas, first, place = await begun(running, ask("r", prompt, 20))
        text = await rest(deltas, first)
        (other,) = {"a", "b"} - {place}
        index = running.pool.replicas.index
        true = running.relays[place]._holdings.snapshot(running.pool.replicas._digest_key)
        assert true is not None
        assert index.apply(other, true), "the other one claims what it has never seen"
        index.forget(place)
        deltas, first, again = await begun(running, ask("s", prompt, 20))
        assert first.prompt is not None
        assert (again, first.prompt.num_cached) == (other, 0)
        assert await rest(deltas, first) == text


async def test_clocks_that_differ_by_a_day_change_nothing():
    async with cluster("a", "b") as running:
        pool = Pool(settings(), running.watch, os.urandom(32), clock=lambda: time.monotonic() - 86_400)
        await pool.start()
        await pool.wait_ready()
        skewed = Cluster(pool, running.watch, running.relays, running.stack)
        deltas, first, place = await begun(skewed, ask("r", "what time is it?", LONG))
        running.kill(place)
        every = [first, *[delta async for delta in deltas]]
        assert "".join(delta.text for delta in every) == expected("what time is it?", LONG)
        assert every[-1].finish is not None
        assert all(0 <= seconds < 600 for seconds in structs.astuple(every[-1].finish.timings))
        assert pool.retry_after_s < 600
        await pool.close()


async def test_who_does_not_know_the_secret_is_let_in_on_neither_side():
    relay, place = await started("a", settings(), fake_thread)
    reader, writer = await asyncio.open_connection(place.host, place.port)
    with pytest.raises(NotProved):
        await greet_replica(reader, writer, b"a guess", bytes(32))
    writer.close()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with pytest.raises(NotProved):
            await greet_ingress(reader, writer, b"no secret")
        writer.close()

    server = await asyncio.start_server(impostor, LOOPBACK, 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    with pytest.raises(NotProved):
        await greet_replica(reader, writer, place.secret, bytes(32))
    writer.close()
    server.close()
    assert place.secret.decode() not in repr(place)
    await relay.close()


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\n\r\n", encode(Alive()), b"\xff\xff\xff\xff", bytes(4), b"\x03\x00"],
    ids=["http", "another message", "a length too large", "an empty frame", "half a length"],
)
async def test_a_replica_lives_on_when_a_stranger_talks_to_it(sent: bytes):
    async with cluster("a", launch=fake_thread) as running:
        place = running.watch.places[0]
        with socket.create_connection((place.host, place.port)) as stranger:
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(stranger, sent)
            stranger.shutdown(socket.SHUT_WR)
            told = b""
            while piece := await loop.sock_recv(stranger, 1 << 16):
                told += piece
        assert len(told) <= MAX_GREETING_BYTES, "no more than a challenge"
        assert await answer(running.pool, ask("s", "hello")) == expected("hello")
