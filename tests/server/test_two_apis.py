"""Where the two APIs disagree, each keeps its own contract; one row a disagreement, both sides in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fake_api import api, events

pytestmark = pytest.mark.quick

Json = dict[str, Any]
Shown = Callable[[httpx.Response], object]
TEXT = "abc def"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The same request in both APIs, what is looked at in the replies, and what is seen there."""

    parameters: Json  # of /generate
    fields: Json  # of /v1/completions
    look_tgi: Shown
    look_openai: Shown
    tgi: object
    openai: object
    stream: bool = False


def status(reply: httpx.Response) -> object:
    return reply.status_code


def tgi_error(reply: httpx.Response) -> object:
    return reply.status_code, reply.json()["error"]


def openai_error(reply: httpx.Response) -> object:
    return reply.status_code, reply.json()["error"]["message"]


def tgi_text(reply: httpx.Response) -> object:
    return reply.json()["generated_text"]


def tgi_finish(reply: httpx.Response) -> object:
    return reply.json()["details"]["finish_reason"]


def choice(name: str) -> Shown:
    return lambda reply: reply.json()["choices"][0][name]


def last_event(reply: httpx.Response) -> object:
    last = events(reply.text)[-1]
    return last if isinstance(last, str) else list(last)


def first_logprobs(values: list[float | None]) -> list[float]:
    return [round(value, 3) for value in values[:2] if value is not None]


DISAGREEMENTS = {
    "a bad value is 422 there and 400 here": Disagreement(
        {"repetition_penalty": 0},
        {"repetition_penalty": 0},
        tgi_error,
        openai_error,
        (422, "Input validation error: `repetition_penalty` must be strictly positive"),
        (400, "repetition_penalty: should be greater than 0"),
    ),
    "temperature 0 is refused there and greedy here": Disagreement(
        {"temperature": 0},
        {"temperature": 0},
        tgi_error,
        choice("text"),
        (422, "Input validation error: `temperature` must be strictly positive"),
        TEXT,
    ),
    "top_p 1 is refused there and off here": Disagreement(
        {"top_p": 1.0},
        {"top_p": 1.0},
        tgi_error,
        choice("text"),
        (422, "Input validation error: `top_p` must be > 0.0 and < 1.0"),
        TEXT,
    ),
    "top_k 0 is refused there and off here": Disagreement(
        {"top_k": 0},
        {"top_k": 0},
        tgi_error,
        choice("text"),
        (422, "Input validation error: `top_k` must be strictly positive"),
        TEXT,
    ),
    "seed -1 is refused there and random here": Disagreement({"seed": -1}, {"seed": -1}, status, status, 422, 200),
    "a stop text in quotes alone is a type error there and a stop here": Disagreement(
        {"stop": "d"}, {"stop": "d"}, status, choice("text"), 422, "abc "
    ),
    "five stops are too many there and fine here": Disagreement(
        {"stop": list("vwxyz")},
        {"stop": list("vwxyz")},
        tgi_error,
        choice("text"),
        (422, "Input validation error: `stop` supports up to 4 stop sequences. Given: 5"),
        TEXT,
    ),
    "the stop text stays there and is cut here": Disagreement(
        {"stop": ["d"]}, {"stop": ["d"]}, tgi_text, choice("text"), "abc d", "abc "
    ),
    "the reason of a stop text": Disagreement(
        {"stop": ["d"], "details": True}, {"stop": ["d"]}, tgi_finish, choice("finish_reason"), "stop_sequence", "stop"
    ),
    "the reason of an end token": Disagreement(
        {"details": True}, {}, tgi_finish, choice("finish_reason"), "eos_token", "stop"
    ),
    "an end token in the last place is the length there and an end here": Disagreement(
        {"details": True, "max_new_tokens": len(TEXT) + 1},
        {"max_tokens": len(TEXT) + 1},
        tgi_finish,
        choice("finish_reason"),
        "length",
        "stop",
    ),
    "no token at all is refused there and an empty answer here": Disagreement(
        {"max_new_tokens": 0},
        {"max_tokens": 0},
        tgi_error,
        choice("text"),
        (422, "Input validation error: `max_new_tokens` must be strictly positive"),
        "",
    ),
    "a stream ends with its last token there and with a mark here": Disagreement(
        {}, {}, last_event, last_event, ["index", "token", "generated_text", "details"], "[DONE]", stream=True
    ),
    "logprobs are of the cut distribution there and of the raw one here": Disagreement(
        {"details": True, "temperature": 20.0, "top_k": 1},
        {"logprobs": 0, "temperature": 20.0, "top_k": 1},
        lambda reply: first_logprobs([token["logprob"] for token in reply.json()["details"]["tokens"]]),
        lambda reply: [value < 0 for value in reply.json()["choices"][0]["logprobs"]["token_logprobs"][:2]],
        [0.0, 0.0],
        [True, True],
    ),
    "more tokens than there is room for are refused there, and an upper bound here": Disagreement(
        {"max_new_tokens": 1024},
        {"max_tokens": 1024},
        tgi_error,
        choice("text"),
        (
            422,
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1024. "
            "Given: 4 `inputs` tokens and 1024 `max_new_tokens`",
        ),
        TEXT,
    ),
    "no share of tokens is refused there and the likeliest here": Disagreement(
        {"top_p": 0.0}, {"top_p": 0.0}, status, choice("text"), 422, TEXT
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
async def test_each_api_keeps_its_own_contract(name: str) -> None:
    row = DISAGREEMENTS[name]
    async with api(TEXT) as http:
        path = "/generate_stream" if row.stream else "/generate"
        there = await http.post(path, json={"inputs": "hi?", "parameters": row.parameters})
        here = await http.post("/v1/completions", json={"prompt": "hi?", **row.fields, "stream": row.stream})
    assert row.look_tgi(there) == row.tgi
    assert row.look_openai(here) == row.openai


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_no_bad_parameter_is_ever_a_400_there(path: str) -> None:
    async with api() as http:
        for row in DISAGREEMENTS.values():
            reply = await http.post(path, json={"inputs": "hi?", "parameters": row.parameters})
            assert reply.status_code in (200, 422), "huggingface_hub takes a 400 for a server of another kind"


async def test_a_wrong_key_has_an_empty_body_there_and_an_error_here() -> None:
    async with api(api_key="secret") as http:
        there = await http.post("/generate", json={"inputs": "hi?"})
        here = await http.post("/v1/completions", json={"prompt": "hi?"})
    assert (there.status_code, there.content) == (401, b"")
    assert (here.status_code, here.json()["error"]["code"]) == (401, "invalid_api_key")
