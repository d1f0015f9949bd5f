"""Sampling fields over HTTP: what bad ones answer, and that good ones reach the text."""

from typing import Any

import pytest
from fake_api import api

PROMPT = {"prompt": "hello?", "max_tokens": 30}
SILLY_TAVERN: dict[str, Any] = {
    "temperature": 1,
    "temperature_last": True,
    "dynamic_temperature": True,
    "dynatemp_low": 0.5,
    "dynatemp_high": 1.5,
    "dynatemp_exponent": 1,
    "smoothing_factor": 0.2,
    "smoothing_curve": 1,
    "top_k": 40,
    "top_p": 0.9,
    "typical": 0.98,
    "min_p": 0.05,
    "top_a": 0.01,
    "tfs": 0.98,
    "nsigma": 2,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.1,
    "mirostat_mode": 2,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": '["\\n",":","\\"","*"]',
    "rep_pen": 1.1,
    "rep_pen_range": 1024,
    "no_repeat_ngram_size": 0,
    "custom_token_bans": "1,2,29871",
    "logit_bias": {"725": 2, "5": 1},
    "seed": 42,
}


async def test_everything_at_once_is_answered_and_the_same_seed_writes_the_same() -> None:
    async with api() as http:
        replies = [await http.post("/v1/completions", json=PROMPT | SILLY_TAVERN) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [200, 200]
        texts = [reply.json()["choices"][0]["text"] for reply in replies]
        assert texts[0] == texts[1]


async def test_banned_strings_and_tokens_never_come_streamed_or_not() -> None:
    async with api("so fine a day") as http:
        for fields in ({"banned_strings": ["FINE"]}, {"custom_token_bans": str(ord("f"))}, {"bad_words": ["fi"]}):
            body = PROMPT | fields | {"temperature": 0}
            whole = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            assert whole.startswith("so ")
            assert "fine" not in whole.lower()
            streamed = (await http.post("/v1/completions", json=body | {"stream": True})).text
            assert "fine" not in streamed


async def test_an_answer_that_can_only_be_banned_ends_with_an_error() -> None:
    async with api("x") as http:
        every_character = [chr(i) for i in range(128)] + ["\ufffd"]
        body = PROMPT | {"banned_strings": every_character, "ignore_eos": True, "max_tokens": 400, "temperature": 0}
        reply = await http.post("/v1/completions", json=body)
        assert reply.json()["choices"][0]["finish_reason"] == "error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.0000001}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"rep_pen": -1}, "rep_pen"),
        ({"min_p": 1.5}, "min_p"),
        ({"typical": -0.1}, "typical"),
        ({"tfs": 1.5}, "tfs"),
        ({"mirostat_mode": 2, "mirostat_tau": 0}, "mirostat_tau"),
        ({"mirostat_mode": 2, "mirostat_eta": 0}, "mirostat_eta"),
        ({"mirostat_mode": 3}, "mirostat_mode"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e30}}, "logit_bias"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"sampler_seed": "7"}, "sampler_seed"),
        ({"stopping_strings": ["a", 7]}, "stopping_strings"),
        ({"xtc_probability": 2}, "xtc_probability"),
        ({"dynamic_temperature": True, "dynatemp_low": 2, "dynatemp_high": 1}, "dynatemp_low"),
        ({"guidance_scale": 101, "negative_prompt": "be rude"}, "guidance_scale"),
    ],
)
async def test_values_out_of_range_are_refused_with_their_name(fields: dict[str, Any], param: str) -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", json=PROMPT | fields)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["param"] == param
        assert param in error["message"]
        assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-30},
        {"temperature": 1e6},
        {"top_k": 10**9},
        {"top_k": -1},
        {"rep_pen": 1e9},
        {"seed": -1},
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        {"dry_multiplier": 1, "dry_base": 1e30, "dry_penalty_last_n": 10**9, "dry_sequence_breakers": ["\n"] * 10_000},
        {"stop": [f"stop number {i}" for i in range(1000)]},
        {"stop": ["x" * 1_000_000]},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_extreme_values_are_answered(fields: dict[str, Any]) -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", json=PROMPT | fields)
        assert reply.status_code == 200
        assert reply.json()["usage"]["completion_tokens"] > 0
