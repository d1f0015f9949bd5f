"""KoboldCpp's own: memory in front, a prompt that loses its oldest text, bans by text, stop strings that stay."""

import asyncio
from typing import Any

import httpx
import pytest
from fake_api import api

WINDOW = 1024
BODY = {"max_length": 8, "temperature": 0, "explain": True}


async def prompt_of(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, list[str]]:
    """The prompt that was run, and the fields that were bent."""
    reply = await http.post("/api/v1/generate", json=BODY | body)
    assert reply.status_code == 200, reply.text
    told = reply.json()["explain"]
    return told["prompts"][0]["text"].removeprefix("<s>"), [bent["field"] for bent in told["bent"]]


async def test_memory_stands_before_the_prompt_whole_and_streamed() -> None:
    async with api() as http:
        assert await prompt_of(http, {"memory": "Mira keeps bees.", "prompt": " Mira?"}) == (
            "Mira keeps bees. Mira?",
            [],
        )
        assert await prompt_of(http, {"memory": "Bees?", "prompt": ""}) == ("Bees?", [])
        ids = await prompt_of(http, {"memory": "Mi", "prompt": [114, 97, 63]})
        assert ids == ("Mira?", ["prompt"])
        body = BODY | {"memory": "Mira keeps bees.", "prompt": "?"}
        streamed = await http.post("/api/extra/generate/stream", json=body)
        assert "Mira keeps bees.?" in streamed.text


@pytest.mark.parametrize(("limit", "answer"), [(None, 8), (64, 8), (64, 4000), (10**9, 8)])
async def test_a_prompt_over_the_window_loses_its_oldest_text_and_keeps_the_memory(
    limit: int | None, answer: int
) -> None:
    story = " ".join(map(str, range(1500))) + "?"
    window = min(limit or WINDOW, WINDOW)
    cut = ["max_tokens"] if answer > WINDOW else []
    room = window - min(answer, window // 2) - 1  # A BOS is in front.
    async with api() as http:
        fields = {"max_context_length": limit, "max_length": answer}
        assert await prompt_of(http, fields | {"prompt": story}) == (story[-room:], ["prompt", *cut])
        text, _ = await prompt_of(http, fields | {"prompt": story, "memory": "Mira keeps bees."})
        assert text == "Mira keeps bees." + story[16 - room :]
        assert len(text) == room
        text, _ = await prompt_of(http, fields | {"prompt": "b?", "memory": "x" * 2000 + "?"})
        assert text == ("<s>" + "x" * 2000 + "?")[-room - 1 :]
        fits = story[-room:]
        assert await prompt_of(http, fields | {"prompt": fits}) == (fits, cut)


async def test_texts_among_banned_tokens_never_come() -> None:
    async with api("fine bees") as http:
        for banned in (["bees"], ["bees", "97"], ["ees"]):
            body = {"prompt": "a?", "max_length": 20, "temperature": 0, "banned_tokens": banned}
            reply = await http.post("/api/v1/generate", json=body)
            assert reply.status_code == 200, reply.text
            assert banned[0] not in reply.json()["results"][0]["text"]


@pytest.mark.parametrize(("trims", "text"), [(None, "fi"), (True, "fi"), (False, "fin")])
async def test_a_stop_string_stays_where_it_is_not_to_be_trimmed(trims: bool | None, text: str) -> None:
    async with api() as http:
        body = {"prompt": "a?", "stop_sequence": ["n"], "trim_stop": trims}
        reply = await http.post("/api/v1/generate", json=body)
        assert reply.json()["results"][0]["text"] == text


async def test_end_tokens_are_banned_by_its_own_name() -> None:
    async with api("x" * 50) as http:
        for banned, num_tokens in ((True, 99), (False, 51)):
            body = {"prompt": "a?", "max_length": 99, "use_default_badwordsids": banned}
            reply = await http.post("/api/v1/generate", json=body)
            assert reply.json()["results"][0]["completion_tokens"] == num_tokens


async def test_a_body_is_read_whatever_its_content_type() -> None:
    async with api() as http:
        for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
            for path in ("/api/v1/generate", "/api/extra/tokencount", "/api/extra/abort"):
                reply = await http.post(path, content=b'{"prompt": "a?"}', headers=headers)
                assert reply.status_code == 200, path


async def test_its_own_page_asks_how_far_an_answer_is_and_what_the_server_is_at() -> None:
    """What was written so far is told to the key that has asked for it."""
    check = "/api/extra/generate/check"
    body = {"prompt": "go on?", "max_length": 400, "genkey": "KCPP1", "temperature": 0}
    async with api("ab" * 400) as http:
        assert (await http.get(check)).json() == {"results": [{"text": ""}]}
        assert (await http.get("/api/extra/perf")).json()["idle"] == 1
        assert (await http.get("/api/v1/config/max_length")).json() == {"value": 512}
        assert (await http.get("/api/extra/preloadstory")).json() == {}
        assert (await http.get("/api/latest/config/soft_prompts_list")).json() == {"values": []}
        asked = asyncio.ensure_future(http.post("/api/v1/generate", json=body))
        texts = [""]
        while not asked.done():
            await asyncio.sleep(0)  # Without a socket nothing here waits, and the answer would never get its turn.
            mine = await http.post(check, json={"genkey": "KCPP1"})
            texts.append(mine.json()["results"][0]["text"])
            others = await http.post(check, json={"genkey": "KCPP1"}, headers={"authorization": "Bearer other"})
            assert others.json() == (await http.post(check)).json() == {"results": [{"text": ""}]}
        whole = (await asked).json()["results"][0]["text"]
        assert (await http.post(check, json={"genkey": "KCPP1"})).json() == {"results": [{"text": ""}]}
        assert (await http.post(check, json={"genkey": 3})).status_code == 400

    assert all(whole.startswith(text) for text in texts)
    assert any(texts)
