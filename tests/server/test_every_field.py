"""What clients and servers of every dialect know as a field is honoured, refused or listed: none is lost in silence.

Honoured is what changes the request that the engine gets, or the answer in another place than its record; refused is an
error that names the field; listed is an entry of the record of ignored fields, or of the log where there is no record.
What a reader's own type knows has to be seen in the engine's request, but for the few fields that the table tells of.
"""

import json
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from fake_api import api
from one_model import front_of_one
from request_fields import (
    BESIDE,
    DIALECTS,
    EXPECTED,
    LENGTHS,
    MEANT,
    OTHER,
    SAMPLING,
    TEMPLATE,
    TOKENIZERS,
    TOOL,
    UNSEEN,
    USER,
    VALUES,
    Dialect,
)

from tightrope.engine.core import EngineCore
from tightrope.engine.process.client import EngineClient
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import GenerateRequest, Written
from tightrope.server.app import create_app
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.settings.settings import ServerSettings

VOLATILE = {"id", "created", "created_at", "timings", "seed", "explain", "stream"}


@dataclass(slots=True)
class Watched:
    """A running application, the requests that its engine has got, and what it has logged."""

    http: httpx.AsyncClient
    requests: list[GenerateRequest]
    log: pytest.LogCaptureFixture
    asked_before: dict[str, tuple[httpx.Response, list[Any]]] = field(default_factory=dict)

    async def ask(self, dialect: Dialect, fields: Mapping[str, Any]) -> tuple[httpx.Response, list[Any]]:
        """The reply, and what of it and of the engine's requests doesn't change from one time to the next."""
        self.requests.clear()
        self.log.clear()
        reply = await self.http.post(dialect.path, json=dialect.with_fields(fields) | {"explain": True})
        asked = [msgspec.structs.replace(request, request_id="") for request in self.requests]
        if "seed" not in fields and "sampler_seed" not in fields:
            sampling = [msgspec.structs.replace(request.sampling, seed=None) for request in asked]
            asked = [msgspec.structs.replace(a, sampling=s) for a, s in zip(asked, sampling, strict=True)]
        return reply, [asked, stable(pieces(reply)) if reply.is_success else None]

    async def ask_once(self, dialect: Dialect, fields: Mapping[str, Any]) -> tuple[httpx.Response, list[Any]]:
        """As `ask`, from memory if just that was asked before."""
        key = f"{dialect.path} {json.dumps(dialect.with_fields(fields), sort_keys=True)}"
        if key not in self.asked_before:
            self.asked_before[key] = await self.ask(dialect, fields)
        return self.asked_before[key]

    async def outcome(self, dialect: Dialect, name: str, value: object) -> str:
        """What becomes of a field: "asked" of the engine, "answered", "refused", "ignored"; or else "lost: ..."."""
        beside = dialect.beside.get(name, BESIDE.get(name, {}))
        if name == "adapter_scale":
            beside = {"adapter_id" if dialect.place else "model": "limarp"}
        other, before = await self.ask_once(dialect, {**beside, name: not value} if isinstance(value, bool) else beside)
        if not other.is_success and beside:
            beside, before = {}, []  # refused itself, so that the field can change nothing
        reply, after = await self.ask(dialect, {**beside, name: value})
        if not reply.is_success:
            is_told = reply.is_client_error and name in reply.text
            return "refused" if is_told else f"lost: {reply.status_code} {reply.text}"
        if before and after[0] != before[0]:
            return "asked"
        if self.is_listed(reply, name):
            return "ignored"
        return "answered" if after != before else f"lost: {reply.text}"

    def is_listed(self, reply: httpx.Response, name: str) -> bool:
        records = [piece["explain"] for piece in pieces(reply) if "explain" in piece]
        listed = [entry["field"] for record in records for entry in (*record["ignored"], *record["bent"])]
        logged = [record.args for record in self.log.records if record.msg.startswith("fields ignored")]
        listed += [field for args in logged if isinstance(args, tuple) for field in args[1]]
        return name in {field.rpartition(".")[2] for field in listed}


def pieces(reply: httpx.Response) -> list[Any]:
    """The JSON of a reply, be it whole, events or lines."""
    if reply.headers["content-type"] == "application/json":
        return [*reply.json()] if isinstance(reply.json(), list) else [reply.json()]
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def stable(answer: object) -> object:
    """A reply without what is new each time."""
    if isinstance(answer, list):
        return [stable(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    return {n: stable(v) for n, v in answer.items() if n not in VOLATILE and not n.endswith(("duration", "details"))}


@pytest_asyncio.fixture
async def watched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> AsyncGenerator[Watched, None]:
    requests: list[GenerateRequest] = []
    prepare = EngineCore.prepare

    def recorded(core: EngineCore, request: GenerateRequest, written: Items[Written | None] = ()) -> list[Sequence]:
        requests.append(request)
        return prepare(core, request, written)

    monkeypatch.setattr(EngineCore, "prepare", recorded)
    caplog.set_level(logging.DEBUG, "tightrope.server")
    engine = EngineSettings.model_validate({"model": {"adapters": {"limarp": "limarp"}}})
    # some fields leave an answer no other end than the model's length: a short one
    async with api(
        "<think>a</think>fine", chat_template=TEMPLATE, added=("<think>", "</think>"), engine=engine, max_model_len=512
    ) as http:
        yield Watched(http, requests, caplog)


COUNTED = {
    "TokenizeInputs",
    "CountedChat",
    "TokenizeChat",
    "CountedResponse",
    "CountTokensRequest",
}  # bodies of which only the tokens are told


def bodies() -> set[str]:
    """The types of the bodies of all routes that have an answer written, which the API page says can be explained."""
    client = EngineClient(EngineSettings())
    page = create_app(front_of_one(client, ServerSettings())).openapi()
    posted = [ways["post"].get("requestBody") for path, ways in page["paths"].items() if "post" in ways]
    names = set(re.findall(r"schemas/(\w+)", json.dumps(posted)))
    return {name for name in names if "explain" in page["components"]["schemas"][name]["properties"]}


def test_every_route_that_writes_has_a_row_for_every_field_of_its_body() -> None:
    assert bodies() == {dialect.reads.__name__ for dialect in DIALECTS.values()} | COUNTED
    known = {field for dialect in DIALECTS.values() for field in dialect.fields - dialect.values.keys()}
    assert known - VALUES.keys() - UNSEEN == set()


@pytest.mark.parametrize("name", DIALECTS)
async def test_what_a_reader_knows_is_asked_of_the_engine(watched: Watched, name: str) -> None:
    dialect = replace(DIALECTS[name], body={k: v for k, v in DIALECTS[name].body.items() if k not in LENGTHS})
    fields = sorted(dialect.fields - UNSEEN)
    values = VALUES | ({"logprobs": 2} if dialect.reads is CompletionRequest else {}) | dialect.values
    outcomes = {field: await watched.outcome(dialect, field, values[field]) for field in fields}
    expected = {field: EXPECTED.get(field, "asked") for field in fields} | dialect.otherwise
    assert {field: what for field, what in outcomes.items() if what != expected[field]} == {}


NESTED = {"model"}  # names that no server has inside parameters or options
ONCE = [name for name in DIALECTS if not name.startswith("invocations") and name != "ollama raw"]


@pytest.mark.parametrize("name", DIALECTS)
async def test_what_an_answer_depends_on_is_honoured_or_refused(watched: Watched, name: str) -> None:
    dialect = DIALECTS[name]
    left_out = {*dialect.body, *dialect.fields, *(NESTED if dialect.place else ())}
    fields = {field: value for field, value in MEANT.items() if field not in left_out}
    outcomes = {field: await watched.outcome(dialect, field, value) for field, value in fields.items()}
    assert {field: what for field, what in outcomes.items() if what not in ("asked", "answered", "refused")} == {}


@pytest.mark.parametrize("name", ONCE)
async def test_no_other_field_is_lost_in_silence(watched: Watched, name: str) -> None:
    dialect = DIALECTS[name]
    left_out = {*dialect.body, *dialect.fields}
    fields = {field: value for field, value in (SAMPLING | OTHER).items() if field not in left_out}
    outcomes = {field: await watched.outcome(dialect, field, value) for field, value in fields.items()}
    assert {field: what for field, what in outcomes.items() if what.startswith("lost")} == {}


@pytest.mark.parametrize("name", TOKENIZERS)
async def test_counting_tokens_loses_no_field_in_silence(watched: Watched, name: str) -> None:
    dialect = TOKENIZERS[name]
    given = MEANT | SAMPLING | OTHER | {"model": "another", "tool_choice": "none"}
    fields = {field: value for field, value in given.items() if field not in dialect.body}
    outcomes = {field: await watched.outcome(dialect, field, value) for field, value in fields.items()}
    assert {field: what for field, what in outcomes.items() if what.startswith("lost")} == {}


@pytest.mark.parametrize("name", [name for name in DIALECTS if not DIALECTS[name].place])
async def test_an_adapter_answers_wherever_a_model_is_named(watched: Watched, name: str) -> None:
    dialect = DIALECTS[name]
    await watched.ask(dialect, {"model": "limarp", "adapter_scale": 0.5})
    (request,) = watched.requests
    assert (request.adapter, request.adapter_scale) == ("limarp", 1.0 if "inputs" in dialect.body else 0.5)
    if "inputs" not in dialect.body:
        reply, _ = await watched.ask(dialect, {"model": "another"})
        if dialect.reads in (ChatRequest, CompletionRequest):
            assert reply.status_code == 404
            assert "`another` does not exist" in reply.json()["error"]["message"]
            assert watched.requests == []
        else:
            assert watched.is_listed(reply, "model")
            assert [request.adapter for request in watched.requests] == [None]


async def test_ollamas_tag_stands_behind_an_adapter_as_behind_the_model(watched: Watched) -> None:
    chat = DIALECTS["ollama chat"]
    reply, _ = await watched.ask(chat, {"model": "limarp:latest"})
    assert reply.json()["model"] == "limarp"
    assert [request.adapter for request in watched.requests] == ["limarp"]
    reply, _ = await watched.ask(chat, {"model": "fake:latest"})
    assert reply.json()["model"] == "fake"
    listed = (await watched.http.get("/api/tags")).json()["models"]
    assert [model["name"] for model in listed] == ["fake", "limarp"]
    assert (await watched.http.post("/api/show", json={"model": "limarp"})).status_code == 200


@pytest.mark.parametrize("name", [name for name in DIALECTS if "tgi" not in name and name != "invocations, inputs"])
async def test_biases_for_ids_outside_the_vocabulary_are_listed(watched: Watched, name: str) -> None:
    reply, _ = await watched.ask(DIALECTS[name], {"logit_bias": {"99999999": 5, "98": 5}})
    assert watched.is_listed(reply, "logit_bias")
    assert [request.sampling.logit_bias for request in watched.requests] == [{98: 5}]


async def test_salts_and_cuts_reach_the_engine_from_the_families_too(watched: Watched) -> None:
    namespaces = set()
    for name in ("koboldcpp", "llama.cpp", "ollama chat"):
        await watched.ask(DIALECTS[name], {"cache_salt": "pepper", "truncate_prompt_tokens": 2})
        (request,) = watched.requests
        assert request.truncate_to == 2
        namespaces.add(request.namespace)
    assert len(namespaces - {""}) == 1


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ollama chat", "messages[0].images"),
        ("ollama generate", "template"),
        ("ollama generate", "context"),
        ("openai chat", "messages[0].prefix"),
    ],
)
async def test_what_is_not_built_is_refused_by_its_place(watched: Watched, name: str, path: str) -> None:
    field = path.rpartition(".")[2]
    dialect = DIALECTS[name]

    def body(value: object) -> dict[str, Any]:
        turns = [{**USER[0], field: value}]
        return {**dialect.body, "messages": turns} if "[0]" in path else {**dialect.body, field: value}

    reply = await watched.http.post(dialect.path, json=body([{"a": 1}]))
    assert reply.status_code == 400
    assert (told := reply.json()["error"])
    assert told.startswith(path) if name.startswith("ollama") else told["param"] == path
    for neutral in ("", [], None, False, {}):
        assert (await watched.http.post(dialect.path, json=body(neutral))).status_code == 200


async def test_a_raw_prompt_does_not_lose_the_system_text(watched: Watched) -> None:
    raw = {"prompt": "Well?", "raw": True, "stream": False}
    refused = await watched.http.post("/api/generate", json=raw | {"system": "Be brief."})
    assert refused.json()["error"].startswith("system: ")
    assert (await watched.http.post("/api/generate", json=raw | {"system": ""})).status_code == 200


async def test_of_ollamas_two_places_the_options_count_and_the_other_is_listed(watched: Watched) -> None:
    body = {**DIALECTS["ollama chat"].body, "temperature": 0.2, "top_k": 3, "options": {"temperature": 0.7, "top_k": 3}}
    told = (await watched.http.post("/api/chat", json=body | {"explain": True})).json()["explain"]
    assert told["ignored"] == [{"field": "temperature", "why": "the options have it too, and count"}]
    assert [request.sampling.temperature for request in watched.requests] == [0.7]


async def test_a_shape_that_gives_way_to_a_forced_call_is_listed(watched: Watched) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    reply, _ = await watched.ask(DIALECTS["openai chat"], fields)
    assert [entry["field"] for entry in reply.json()["explain"]["ignored"]] == ["response_format"]


async def test_unread_fields_are_logged_once_with_the_route(watched: Watched) -> None:
    await watched.http.post("/v1/token/encode", json={"text": "a", "zebra": 1})
    messages = [record.getMessage() for record in watched.log.records]
    assert messages.count("fields ignored: path=/v1/token/encode fields=['zebra']") == 1
