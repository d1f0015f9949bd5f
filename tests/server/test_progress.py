"""A client can see that a long prompt is being read: by an event, where it asks, or by a comment."""

from collections.abc import Mapping
from typing import Any

import httpx
import msgspec
import pytest
from fake_api import api
from fakes import letters

from tightrope.server import answering

WORDS = "tell me more " * 50  # 650 tokens, in steps of 64 at most
LENGTH = {"max_tokens": 5, "temperature": 0}
STREAMS: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": WORDS, **LENGTH, "stream": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": WORDS}], **LENGTH, "stream": True},
    "/completion": {"prompt": WORDS, **LENGTH, "stream": True},
    "/api/extra/generate/stream": {"prompt": WORDS, **LENGTH},
    "/api/generate": {"prompt": WORDS, "raw": True, **LENGTH},
    "/api/chat": {"messages": [{"role": "user", "content": WORDS}], **LENGTH},
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def objects(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [msgspec.json.decode(line) for line in lines if line.startswith("{")]


def texts(reply: httpx.Response) -> str:
    """The text of a stream in any dialect."""
    found = ""
    for one in objects(reply):
        part = one["choices"][0] if one.get("choices") else one
        part = part.get("delta", part)
        found += next((part[key] for key in ("text", "content", "token", "response") if part.get(key)), "")
        found += part.get("message", {}).get("content", "")
    return found


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_tells_how_much_of_its_prompt_has_been_read_where_it_is_asked_to(path: str) -> None:
    async with api(letters, chat_template=TEMPLATE) as http:
        told = await http.post(path, json={**STREAMS[path], "return_progress": True})
        reads = [one["prompt_progress"] for one in objects(told) if "prompt_progress" in one]
        assert {frozenset(read) for read in reads} == {frozenset({"total", "cache", "processed", "time_ms"})}
        processed = [read["processed"] for read in reads]
        assert len(processed) > 5
        assert processed == sorted(set(processed))
        assert {read["total"] for read in reads} == {processed[-1]} == {len(WORDS) + 1}
        assert all(read["cache"] == 0 for read in reads)
        assert all(isinstance(read["time_ms"], int) and read["time_ms"] >= 0 for read in reads)
        kinds = ["prompt_progress" in one for one in objects(told)]
        assert kinds == sorted(kinds, reverse=True), "the answer comes behind all of it"

        without = await http.post(path, json=STREAMS[path])
        assert "prompt_progress" not in without.text
        assert texts(told) == texts(without) != ""


async def test_what_was_found_cached_counts_as_read() -> None:
    async with api(letters) as http:
        body = {**STREAMS["/v1/completions"], "return_progress": True}
        await http.post("/v1/completions", json=body)
        (read,) = [
            one["prompt_progress"]
            for one in objects(await http.post("/v1/completions", json=body))
            if "prompt_progress" in one
        ]
        assert (read["cache"], read["processed"], read["total"]) == (len(WORDS), len(WORDS) + 1, len(WORDS) + 1)


async def test_each_prompt_of_a_request_is_told_of_once() -> None:
    async with api(letters) as http:
        body = {**STREAMS["/v1/completions"], "prompt": [WORDS, "short"], "n": 2, "return_progress": True}
        ends = [
            one["choices"][0]["index"]
            for one in objects(await http.post("/v1/completions", json=body))
            if "prompt_progress" in one and one["prompt_progress"]["processed"] == one["prompt_progress"]["total"]
        ]
        assert sorted(ends) == [0, 2]


@pytest.mark.parametrize("path", [*STREAMS, "/generate_stream"])
async def test_without_being_asked_a_stream_that_has_begun_has_comments(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "FIRST_DELTA_S", 0.0)  # as if its first delta had let it wait for so long
    monkeypatch.setattr(answering, "COMMENT_S", 0.0)
    body = STREAMS.get(path, {"inputs": WORDS, "parameters": {"max_new_tokens": 5}})
    async with api(letters, chat_template=TEMPLATE) as http:
        reply = await http.post(path, json=body)
        comments = [line for line in reply.text.splitlines() if line.startswith(": read ")]
        if reply.headers["content-type"].startswith("application/x-ndjson"):
            assert not comments, "lines of JSON have none"
        else:
            assert len(comments) > 5
            assert comments[-1].endswith(f" of {len(WORDS) + 1} tokens")
            assert reply.text.startswith(": read ")
            assert ": read" not in reply.text.partition("data:")[2]


async def test_a_prompt_that_is_read_in_one_step_makes_no_noise() -> None:
    async with api(letters) as http:
        assert ": read" not in (await http.post("/v1/completions", json={**STREAMS["/completion"], "prompt": "a"})).text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": WORDS, **LENGTH}),
        ("/generate", {"inputs": WORDS, "parameters": {"max_new_tokens": 5, "return_progress": True}}),
        ("/generate_stream", {"inputs": WORDS, "parameters": {"max_new_tokens": 5, "return_progress": True}}),
    ],
)
async def test_where_there_is_no_place_for_it_the_field_is_listed(path: str, body: dict[str, Any]) -> None:
    asked = {**body, "explain": True} if "inputs" in body else {**body, "explain": True, "return_progress": True}
    async with api(letters) as http:
        reply = await http.post(path, json=asked)
        (listed,) = [one["explain"]["ignored"] for one in objects(reply) if "explain" in one]
        assert "return_progress" in [entry["field"] for entry in listed]
        assert "prompt_progress" not in reply.text
