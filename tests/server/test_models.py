"""Several models: whom a request means, who is loaded for it, and who makes room."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_clients import until
from fake_api import events
from fake_models import GIB, Gate, Several, several

from tightrope.engine.errors import Overloaded
from tightrope.server import answering

KEEP_ROOM = {"engine": {"limits": {"max_waiting": 64}}}


async def test_a_requests_model_is_loaded_and_the_least_recently_used_makes_room() -> None:
    async with several("a", "b", "c", models_max=2) as running:
        assert set(running.states().values()) == {"unloaded"}
        assert [await running.said(name) for name in ("a", "b", "a")] == ["a", "b", "a"]
        assert await running.said("c") == "c"
        assert running.states() == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert running.loaded == ["a", "b", "c"]


async def test_who_is_not_named_is_the_one_that_was_used_last_or_the_first() -> None:
    async with several("a", "b") as running:
        assert await running.said(None) == "a"
        assert await running.said("b") == "b"
        assert await running.said("") == "b"
        listed = (await running.http.get("/v1/internal/model/info")).json()
        assert listed["model_name"] == "b"


async def test_a_name_that_is_not_there_is_told_in_the_routes_shape_with_those_that_are() -> None:
    long = "x" * 1000
    async with several("a", "b") as running:
        for name in ("c", "../a", "/models/a", "a\0", "a.gguf", "A", long):
            reply = await running.ask(name)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert error["message"].endswith("does not exist; there are a, b.")
            assert len(error["message"]) < 300
        body: dict[str, Any] = {"model": "c", "prompt": "Well?", "stream": False}
        assert (await running.http.post("/api/generate", json=body)).json()["error"].endswith("there are a, b.")
        reply = await running.http.post("/generate", json={"inputs": "Well?", "model": "c"})
        assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
        assert (await running.http.get("/v1/models/c")).status_code == 404
        assert (await running.http.post("/models/load", json={"model": "../../etc/passwd"})).status_code == 404
        assert set(running.states().values()) == {"unloaded"}


async def test_any_name_means_the_current_model_where_the_settings_say_so() -> None:
    async with several("a", "b", any_model_name=True) as running:
        assert await running.said("b") == "b"
        assert await running.said("gpt-4o") == "b"


async def test_an_answer_under_way_is_finished_before_its_model_makes_room() -> None:
    async with several("a", "b", models_max=1, **KEEP_ROOM) as running:
        assert await running.said("a") == "a"
        gate = running.answers["a"] = Gate()
        open_answer = asyncio.create_task(running.said("a", "Wait?"))
        await until(gate.reached.is_set)
        other = asyncio.create_task(running.said("b"))
        a = running.models.all[0]
        await until(lambda: a.is_leaving)
        late = asyncio.create_task(running.said("a"))  # It waits behind b, or b would never have its turn.
        await until(lambda: a.is_wanted)
        assert running.states() == {"a": "loaded", "b": "unloaded"}
        gate.opened.set()
        assert await asyncio.gather(open_answer, other, late) == ["a", "b", "a"]
        assert running.loaded == ["a", "b", "a"]


async def test_whichever_is_idle_first_makes_room() -> None:
    async with several("a", "b", "c", models_max=2, **KEEP_ROOM) as running:
        gates = {name: Gate() for name in ("a", "b")}
        for name in gates:
            await running.said(name)
        running.answers.update(gates)
        answers = {name: asyncio.create_task(running.said(name, "Wait?")) for name in gates}
        for gate in gates.values():
            await until(gate.reached.is_set)
        a = running.models.all[0]
        third = asyncio.create_task(running.said("c"))
        await until(lambda: a.is_leaving)  # It was used less recently than b, which ends sooner.
        gates["b"].opened.set()
        assert await third == "c"
        assert running.states() == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert not a.is_leaving
        gates["a"].opened.set()
        assert [await answers[name] for name in ("a", "b")] == ["a", "b"]


async def test_models_are_side_by_side_as_far_as_their_plans_have_room() -> None:
    async with several("a", "b", "c", models_max=4) as running:
        running.free_bytes = 10 * GIB
        running.needs = {"a": 3 * GIB, "b": 3 * GIB, "c": 4 * GIB}
        for name in ("a", "b"):
            await running.said(name)
        assert running.states() == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        promised_mib = (3 * GIB >> 20) + 512  # What a may still take, with its libraries.
        assert running.told["a"].model.keep_free_mib == 0
        assert [model.engine._settings.model.keep_free_mib for model in running.models.all[:2]] == [0, promised_mib]
        await running.said("c")
        assert running.states() == {"a": "unloaded", "b": "loaded", "c": "loaded"}


async def test_a_model_is_planned_once_and_not_at_all_while_it_is_alone() -> None:
    async with several("a", "b", models_max=1) as running:
        await running.said("a")
        assert running.num_plans == 0
        for name in ("b", "a", "b", "a"):
            await running.said(name)
        assert running.num_plans == 2


@pytest.mark.parametrize("kind", ["unplanned", "refused"])
async def test_a_model_that_cannot_be_served_names_itself_and_leaves_the_other_serving(kind: str) -> None:
    async with several("a", "bad", models_max=1) as running:
        getattr(running, kind).add("bad")
        running.needs["bad"] = 1000 * GIB
        await running.said("a")
        reply = await running.ask("bad")
        assert reply.status_code == 500
        why = {"unplanned": "/models/bad.gguf: not a GGUF file", "refused": "weights and workspace take too much"}[kind]
        assert reply.json()["error"]["message"] == f"the model `bad` can't be loaded: {why}"
        assert running.states() == {"a": "loaded", "bad": "failed"}
        assert running.loaded == ["a"]
        listed = {card["id"]: card["status"] for card in (await running.http.get("/v1/models")).json()["data"]}
        assert listed["a"]["value"] == "loaded"
        assert (listed["bad"]["value"], listed["bad"]["message"]) == ("failed", reply.json()["error"]["message"])
        assert (await running.http.get("/health")).status_code == 200


async def test_a_load_that_fails_is_told_in_each_routes_shape_and_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with several("a", "bad", models_max=2) as running:
        running.broken.add("bad")
        line = "the model `bad` can't be loaded: /models/bad.gguf: not a GGUF file"
        assert (await running.ask("bad")).json()["error"]["message"] == line
        reply = await running.http.post("/generate", json={"inputs": "Well?", "model": "bad"})
        assert (reply.status_code, reply.json()["error_type"]) == (424, "generation")
        reply = await running.http.post(
            "/api/chat", json={"model": "bad", "messages": [{"role": "user", "content": "?"}]}
        )
        assert (reply.status_code, reply.json()) == (500, {"error": line})
        reply = await running.http.post("/v1/model/load", json={"model_name": "bad"})
        assert events(reply.text)[-1]["error"]["message"] == line
        assert await running.said("a") == "a"
        running.broken.clear()  # It is mended, and a moment later somebody asks.
        assert (await running.ask("bad")).status_code == 500
        monkeypatch.setattr("tightrope.server.models.models.AGAIN_S", 0.0)
        assert await running.said("bad") == "bad"


async def test_a_load_that_fails_with_room_made_for_it_leaves_nobody_waiting() -> None:
    async with several("a", "bad", models_max=1) as running:
        running.broken.add("bad")  # Its headers are good, and its weights are not.
        await running.said("a")
        assert (await running.ask("bad")).status_code == 500
        assert await running.said("a") == "a"


async def test_requests_for_one_model_share_a_load_and_loads_take_turns() -> None:
    async with several("a", "b", models_max=2, **KEEP_ROOM) as running:
        gate = running.loads["a"] = Gate()
        first = [asyncio.create_task(running.said("a")) for _ in range(5)]
        await until(gate.reached.is_set)
        second = asyncio.create_task(running.said("b"))
        await until(lambda: running.models.all[1].is_wanted)
        assert running.loaded == []
        statuses = [card["status"]["value"] for card in (await running.http.get("/v1/models")).json()["data"]]
        assert statuses == ["loading", "loading"]
        gate.opened.set()
        assert await asyncio.gather(*first, second) == [*"aaaaa", "b"]
        assert running.loaded == ["a", "b"]


async def test_more_may_not_wait_for_loads_than_may_wait_at_all() -> None:
    async with several("a", "b", engine={"limits": {"max_waiting": 2}}) as running:
        gate = running.loads["a"] = Gate()
        waiting = [asyncio.create_task(running.said("a")) for _ in range(3)]
        await until(lambda: len(running.models.all[0].waiting) == 3)
        reply = await running.ask("b")
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, Overloaded.code)
        assert int(reply.headers["retry-after"]) >= 1
        gate.opened.set()
        assert await asyncio.gather(*waiting) == ["a"] * 3


async def test_nothing_is_loaded_for_a_client_that_has_gone() -> None:
    async with several("a", "b", "c", **KEEP_ROOM) as running:
        gate = running.loads["a"] = Gate()
        first = asyncio.create_task(running.said("a"))
        await until(gate.reached.is_set)
        gone = asyncio.create_task(running.said("b"))
        last = asyncio.create_task(running.said("c"))
        (_, b, c) = running.models.all
        await until(lambda: b.is_wanted and c.is_wanted)
        gone.cancel()
        await asyncio.wait((gone,))
        gate.opened.set()
        assert await asyncio.gather(first, last) == ["a", "c"]
        assert running.loaded == ["a", "c"]
        assert all(model.is_idle for model in running.models.all)


async def test_what_idles_is_unloaded_and_comes_back() -> None:
    async with several("a", "b", sleep_idle_s=0.1) as running:
        assert await running.said("a") == "a"
        await until(lambda: running.states()["a"] == "unloaded")
        assert (await running.http.get("/health")).status_code == 200
        assert (await running.http.get("/v1/internal/model/info")).json()["model_name"] == "a"
        assert await running.said("a") == "a"
        assert running.loaded == ["a", "a"]


async def test_the_name_of_an_adapter_loads_its_model(tmp_path: Path) -> None:
    path = tmp_path / "limarp"
    path.write_text("weights")
    async with several("a", "b", adapters={"b": {"limarp": str(path)}}, models_max=1) as running:
        reply = await running.ask("limarp")
        assert (reply.status_code, reply.json()["model"]) == (200, "limarp")
        assert running.states() == {"a": "unloaded", "b": "loaded"}
        cards = (await running.http.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("a", None), ("b", None), ("limarp", "b")]
        await running.said("a")
        assert (await running.ask("limarp")).status_code == 200


async def test_an_adapter_that_was_loaded_beside_its_model_comes_back_with_it(tmp_path: Path) -> None:
    (tmp_path / "limarp").write_text("weights")
    engine = {"model": {"adapter_folder": str(tmp_path)}}
    async with several("a", "b", models_max=1, admin_key="secret", engine=engine) as running:
        http, key = running.http, {"x-admin-key": "secret"}
        body = {"lora_path": "limarp", "model": "b"}
        for name in ("a", "b"):
            reply = await http.post("/v1/load_lora_adapter", json={"lora_name": name, **body}, headers=key)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_name")
        reply = await http.post("/v1/load_lora_adapter", json={"lora_name": "limarp", **body}, headers=key)
        assert reply.status_code == 200, reply.text
        assert await running.said("a") == "a"
        assert (await running.ask("limarp")).json()["model"] == "limarp"
        assert running.states() == {"a": "unloaded", "b": "loaded"}
        await running.said("a")
        reply = await http.post("/v1/unload_lora_adapter", json={"lora_name": "limarp"}, headers=key)
        assert reply.status_code == 200, reply.text
        assert (await running.ask("limarp")).status_code == 404


async def test_a_stream_that_waits_for_a_load_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "FIRST_DELTA_S", 0.0)
    async with several("a", "b", models_max=1) as running:
        gate = running.loads["b"] = Gate()
        await running.said("a")
        stream = asyncio.create_task(running.ask("b", stream=True))
        await until(gate.reached.is_set)
        await until(lambda: running.models.all[1].engine.load_share == 0.25)
        gate.opened.set()
        told = (await stream).text
        assert told.startswith(": loading b, ")
        assert "".join(event["choices"][0]["text"] for event in events(told)[:-1]) == "b"


async def test_a_stream_whose_load_fails_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "FIRST_DELTA_S", 0.0)
    async with several("a", "bad") as running:
        running.broken.add("bad")
        gate = running.loads["bad"] = Gate()
        stream = asyncio.create_task(running.ask("bad", stream=True))
        await until(gate.reached.is_set)
        gate.opened.set()
        reply = await stream
        told = events(reply.text)[-1]
        assert told["error"]["message"] == "the model `bad` can't be loaded: /models/bad.gguf: not a GGUF file"


async def test_a_server_of_several_models_ends_in_the_middle_of_a_load() -> None:
    async with several("a", "b") as running:
        gate = running.loads["a"] = Gate()
        asked = asyncio.create_task(running.ask("a"))
        await until(gate.reached.is_set)
        asked.cancel()
        await asyncio.wait((asked,))
        gate.opened.set()


# ---- the routes of other servers ----


async def loaded(running: Several) -> list[str]:
    return [model["name"] for model in (await running.http.get("/api/ps")).json()["models"]]


async def test_every_servers_own_routes_list_load_and_unload() -> None:
    async with several("a", "b") as running:
        http = running.http
        lists = {
            "/models": lambda told: [card["id"] for card in told["data"]],
            "/v1/model/list": lambda told: [card["id"] for card in told["data"]],
            "/v1/internal/model/list": lambda told: told["model_names"],
            "/api/tags": lambda told: [model["name"] for model in told["models"]],
            "/api/admin/list_options": lambda told: told[:-1],
        }
        for path, names in lists.items():
            assert names((await http.get(path)).json()) == ["a", "b"], path
        ways: dict[str, tuple[tuple[str, Any], tuple[str, Any]]] = {
            "llama.cpp": (("/models/load", {"model": "b"}), ("/models/unload", {"model": "b"})),
            "tabby": (("/v1/model/load", {"model_name": "b"}), ("/v1/model/unload", None)),
            "ooba": (("/v1/internal/model/load", {"model_name": "b"}), ("/v1/internal/model/unload", None)),
            "kobold": (
                ("/api/admin/reload_config", {"filename": "b"}),
                ("/api/admin/reload_config", {"filename": "unload_model"}),
            ),
            "ollama": (("/api/generate", {"model": "b"}), ("/api/generate", {"model": "b", "keep_alive": 0})),
        }
        for family, both in ways.items():
            for (path, body), names in zip(both, (["b"], []), strict=True):
                reply = await http.post(path, json=body) if body is not None else await http.post(path)
                assert reply.status_code == 200, (family, path, reply.text)
                assert await loaded(running) == names, (family, path)
        assert running.loaded == ["b"] * len(ways)


async def test_tabbys_load_tells_how_far_it_is() -> None:
    async with several("a") as running:
        told = events((await running.http.post("/v1/model/load", json={"name": "a"})).text)
        assert {event["status"] for event in told[:-1]} == {"processing"}
        assert told[-1] == {"model_type": "model", "module": 100, "modules": 100, "status": "finished"}


async def test_ollamas_keep_alive_says_how_long_a_model_stays() -> None:
    async with several("a", "b") as running:
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Well?"}], "stream": False}
        for name, keep in (("a", "1h30m"), ("b", -1)):
            reply = await running.http.post("/api/chat", json={"model": name, "keep_alive": keep, **chat})
            assert reply.status_code == 200, reply.text
        a, b = running.models.all
        assert (a.idle_s, b.idle_s) == (5400.0, float("inf"))
        first, second = (await running.http.get("/api/ps")).json()["models"]
        assert first["expires_at"] < second["expires_at"] == "2318-12-31T00:00:00Z"
        await running.http.post("/api/chat", json={"model": "a", "keep_alive": 0, **chat})
        await until(lambda: running.states() == {"a": "unloaded", "b": "loaded"})
        reply = await running.http.post("/api/chat", json={"model": "a", "keep_alive": "soon", **chat})
        assert (reply.status_code, reply.json()["error"].partition(":")[0]) == (
            400,
            "keep_alive should be seconds, or a duration such as 5m",
        )


async def test_what_is_told_of_a_model_that_was_never_loaded_is_its_name() -> None:
    async with several("a", "b") as running:
        shown = await running.http.post("/api/show", json={"model": "b"})
        assert (shown.status_code, shown.json()["capabilities"]) == (200, ["completion"])
        assert running.loaded == []
        assert (await running.http.get("/props")).status_code == 503
        props = (await running.http.get("/props", params={"model": "b"})).json()
        assert props["model_path"] == "b"
        card = (await running.http.get("/v1/models/b")).json()
        assert (card["max_model_len"], card["status"]["value"]) == (1024, "loaded")


async def test_a_request_that_is_refused_behind_a_load_is_told_in_the_routes_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "FIRST_DELTA_S", 0.0)
    async with several("a", "b") as running:
        reply = await running.http.post(
            "/v1/messages",
            json={"model": "b", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": "x" * 9000}]},
        )
        assert reply.status_code == 200
        assert "event: error" in reply.text
        assert "prompt is too long: 9042 tokens > 1024 maximum" in reply.text


async def test_health_and_metrics_tell_models_apart() -> None:
    async with several("a", "b", "c") as running:
        for name in ("a", "b"):
            await running.said(name)
        await running.models.unload("a")
        health = {name: (await running.http.get("/health", params={"model": name})).status_code for name in "abcd"}
        assert health == {"a": 503, "b": 200, "c": 503, "d": 503}
        told = (await running.http.get("/metrics")).text
        assert 'tightrope_model_state{model="a",state="unloaded"} 1.0' in told
        assert 'tightrope_model_loads_total{model="b"} 1.0' in told
        assert 'model="c"' not in told
