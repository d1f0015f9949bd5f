"""`explain: true`: what was done with a request, told in the answer itself."""

import json
from typing import Any

import pytest
from fake_api import api, events

from tightrope.engine.sampler.steps import SamplingParams
from tightrope.server.fields.explain import samplers

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}?"
)


async def explained(
    path: str, body: dict[str, Any], template: str = "{{ bos_token }}{{ messages[0].content }}?"
) -> dict[str, Any]:
    async with api("Fine.", chat_template=template) as http:
        whole = (await http.post(path, json=body | {"explain": True})).json()["explain"]
        streamed = events((await http.post(path, json=body | {"explain": True, "stream": True})).text)
        (told,) = [event for event in streamed if isinstance(event, dict) and "explain" in event]
        assert told["choices"] == []
        again = told["explain"]
    for prompt, later in zip(whole["prompts"], again["prompts"], strict=True):
        assert later["tokens_reused"] == len(prompt["token_ids"]) - 1
        assert prompt | {"tokens_reused": 0, "seed": 0} == later | {"tokens_reused": 0, "seed": 0}
    assert whole | {"prompts": []} == again | {"prompts": []}
    return whole


async def test_a_chats_prompt_is_shown_as_it_was_run() -> None:
    record = await explained("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})
    (prompt,) = record["prompts"]
    assert prompt["text"] == "<s>Hi?"
    assert prompt["token_ids"] == [256, *b"Hi?"]
    assert prompt["bos"] == "one: it stands in the prompt"
    assert prompt["tokens_reused"] == 0
    assert record["stop"]["max_tokens"] == 4
    assert record["notes"] == []


@pytest.mark.parametrize(
    ("prompt", "fields", "bos", "ids"),
    [
        ("a", {}, "one: put in front by the server", [256, 97]),
        ("<s>a", {}, "one: it stands in the prompt", [256, 97]),
        ("<s><s>a", {}, "one: 2 stood at the start of the prompt, and one of them was kept", [256, 97]),
        ("<s><s>a", {"add_bos_token": False}, "2: they stand in the prompt", [256, 256, 97]),
        ("a", {"add_bos_token": False}, "none: neither the model nor the prompt wants one", [97]),
        ([97, 98], {}, "token ids are run as they are", [97, 98]),
        ("abc", {"truncate_prompt_tokens": 2}, "one: put in front by the server", [98, 99]),
    ],
)
async def test_the_decision_about_bos_is_told(prompt: object, fields: dict[str, Any], bos: str, ids: list[int]) -> None:
    (told,) = (await explained("/v1/completions", {"prompt": prompt, **fields}))["prompts"]
    assert (told["bos"], told["token_ids"]) == (bos, ids)


OTHER_ROUTES = {  # route by body, and where the streamed record stands
    "/generate": ({"inputs": "a?"}, "/generate_stream"),
    "/completion": ({"prompt": "a?", "temperature": 0}, "/completion"),
    "/api/v1/generate": ({"prompt": "a?", "temperature": 0}, "/api/extra/generate/stream"),
    "/api/generate": ({"prompt": "a?", "raw": True, "options": {"temperature": 0}}, "/api/generate"),
    "/api/chat": ({"messages": [{"role": "user", "content": "a"}], "options": {"temperature": 0}}, "/api/chat"),
}


@pytest.mark.parametrize("path", OTHER_ROUTES)
async def test_every_route_that_writes_tells_of_its_one_prompt(path: str) -> None:
    body, streamed_path = OTHER_ROUTES[path]
    body |= {"explain": True, "zebra": 1}
    async with api("Fine.", chat_template="{{ messages[0].content }}?") as http:
        whole = (await http.post(path, json=body | {"stream": False})).json()
        lines = (await http.post(streamed_path, json=body | {"stream": True})).text.splitlines()
        silent = await http.post(path, json=body | {"explain": False, "stream": False})
    told = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    assert ["explain" in event for event in told] == [False] * (len(told) - 1) + [True], "in the last event alone"
    assert "explain" not in silent.text
    for record in (whole["explain"], told[-1]["explain"]):
        assert [prompt["text"] for prompt in record["prompts"]] == ["a?"]
        assert record["prompts"][0]["token_ids"] == [256, *b"a?"]
        assert {"zebra"} <= {entry["field"] for entry in record["ignored"]} <= {"zebra", "stream"}
        assert (record["samplers"] == [{"temperature": 0.0}]) == (path != "/generate"), "drawn, for want of parameters"


async def test_each_prompt_of_a_batch_is_told() -> None:
    record = await explained("/v1/completions", {"prompt": ["ab", "cd"], "n": 2})
    assert [prompt["text"] for prompt in record["prompts"]] == ["ab", "cd"]


async def test_ignored_fields_come_with_reasons() -> None:
    body = {"prompt": "a", "api_type": "tabby", "truncation_length": 8192, "length_penalty": 2, "zebra": 1, "top_k": -1}
    record = await explained("/v1/completions", body)
    assert [entry["field"] for entry in record["ignored"]] == [
        "api_type",
        "length_penalty",
        "truncation_length",
        "zebra",
    ]
    assert all(entry["why"] for entry in record["ignored"])


async def test_merged_messages_are_told_of() -> None:
    turns = [{"role": role, "content": "x"} for role in ("system", "system", "assistant", "user")]
    record = await explained("/v1/chat/completions", {"messages": turns}, ALTERNATING)
    assert record["notes"] == ["messages were merged into 3 turns: roles must alternate"]


async def test_without_the_field_nothing_is_explained() -> None:
    async with api() as http:
        assert "explain" not in (await http.post("/v1/completions", json={"prompt": "a"})).json()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), []),
        (SamplingParams(temperature=0, top_k=5), [{"temperature": 0}]),
        (
            SamplingParams(top_p=0.9, temperature=0.5, top_k=40, repetition_penalty=1.1),
            [
                {"repetition_penalty": 1.1, "penalty_range": 0, "repetition_decay": 0},
                {"temperature": 0.5, "dynatemp_range": 0, "dynatemp_exponent": 1},
                {"top_k": 40},
                {"top_p": 0.9},
            ],
        ),
        (SamplingParams(top_p=0.9, top_k=40, order=("top_p",)), [{"top_p": 0.9}, {"top_k": 40}]),
        (
            SamplingParams(adaptive_target=0.5, skew=0.1),
            [{"adaptive_target": 0.5, "adaptive_decay": 0.9}, {"skew": 0.1}],
        ),
        (
            SamplingParams(dynatemp_range=0.5, xtc_probability=0.5, mirostat_mode=2, min_keep=2),
            [
                {"temperature": 1, "dynatemp_range": 0.5, "dynatemp_exponent": 1},
                {"xtc_probability": 0.5, "xtc_threshold": 0.1, "xtc_ignore_tokens": (), "xtc_spares_ends": False},
                {"min_keep": 2},
                {"mirostat_mode": 2, "mirostat_tau": 5, "mirostat_eta": 0.1},
            ],
        ),
    ],
)
def test_samplers_are_listed_in_the_order_in_which_they_run(params: SamplingParams, expected: list[Any]) -> None:
    assert samplers(params) == expected


def test_every_parameter_is_shown_by_some_step() -> None:
    other = {
        "logit_bias": {1: 1.0},
        "seed": 1,
        "order": ("top_k",),
        "banned_tokens": (1,),
        "banned_strings": ("a",),
        "dry_sequence_breakers": ("x",),
    }
    fields = {name: other.get(name, 0.5) for name in SamplingParams.__struct_fields__}
    shown = {name for step in samplers(SamplingParams(**fields)) for name in step}
    assert shown == fields.keys() - {"seed", "order"}, "these two are told otherwise"
