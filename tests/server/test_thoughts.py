"""Thoughts over HTTP: apart from the answer, whole and in a stream, asked for, bounded and left out."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from fake_api import api, events

ROUTE = "/v1/chat/completions"
THINK = ("<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think></think>?{% endif %}"
)
OPENS = "{{ messages[-1].content }}{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}{# </think> #}"
HARMONY = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{# <|channel|><|message|> {{ reasoning_effort }} #}"
    "{{ '[' ~ reasoning_effort ~ ']?' if reasoning_effort }}"
)
MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 200}
HARMONIOUS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}


def message(answer: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    (choice,) = answer.json()["choices"]
    made: dict[str, Any] = choice["message"]
    return made


@pytest.mark.parametrize(
    ("text", "template", "special", "added"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", TEMPLATE, (), ()),
        ("<think>\nHm.\n</think>\n\nYes.", TEMPLATE, (), THINK),
        ("<think>\nHm.\n</think>\n\nYes.", TEMPLATE, THINK, ()),
        ("Hm.\n</think>\n\nYes.", OPENS, THINK, ()),
        ("[THINK]Hm.[/THINK]Yes.", "{# [THINK] [/THINK] #}{{ messages[-1].content }}", ("[THINK]", "[/THINK]"), ()),
        (
            "<|channel>thought\nHm.<channel|>Yes.",
            "{# <|channel>thought\\n<channel|> #}{{ messages[-1].content }}",
            ("<|channel>", "<channel|>"),
            (),
        ),
        (HARMONIOUS, HARMONY, MARKS, ()),
    ],
)
async def test_thoughts_come_apart_whole_and_in_a_stream(
    text: str, template: str, special: Sequence[str], added: Sequence[str]
) -> None:
    answer = f"ab{text}" if template is OPENS else text  # Two tokens of the prompt stand behind its question mark.
    async with api(answer, chat_template=template, special=special, added=added) as http:
        whole = await http.post(ROUTE, json=ASK)
        stream = events((await http.post(ROUTE, json=ASK | {"stream": True})).text)
        logged = events((await http.post(ROUTE, json=ASK | {"stream": True, "logprobs": True})).text)
    assert message(whole) == {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes."}
    for chunks in (stream, logged):
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
        assert not any({"content", "reasoning_content"} <= delta.keys() for delta in deltas)
    num_listed = sum(len((chunk["choices"][0]["logprobs"] or {"content": []})["content"]) for chunk in logged[:-1])
    assert num_listed == whole.json()["usage"]["completion_tokens"]


async def test_a_client_may_want_no_thoughts_or_all_in_one_text() -> None:
    text = "<think>Hm.</think>Yes."
    async with api(text, chat_template=TEMPLATE, special=THINK) as http:
        dropped = await http.post(ROUTE, json=ASK | {"include_reasoning": False})
        raw = await http.post(ROUTE, json=ASK | {"reasoning_format": "none"})
        streamed = events((await http.post(ROUTE, json=ASK | {"include_reasoning": False, "stream": True})).text)
        completion = await http.post("/v1/completions", json={"prompt": "Why?", "max_tokens": 99})
        generated = await http.post("/generate", json={"inputs": "Why?", "parameters": {"max_new_tokens": 99}})
    assert message(dropped) == {"role": "assistant", "content": "Yes."}
    assert message(raw) == {"role": "assistant", "content": text}
    assert "Hm." not in json.dumps(streamed)
    assert completion.json()["choices"][0]["text"] == "Hm.Yes.", "special tokens are left out of raw completions"
    assert generated.json()["generated_text"] == "Hm.Yes."


async def test_raw_completions_are_what_the_model_writes() -> None:
    async with api("<think>Hm.</think>Yes.", chat_template=TEMPLATE) as http:
        raw = await http.post("/v1/completions", json={"prompt": "Why?", "max_tokens": 99})
    assert raw.json()["choices"][0]["text"] == "<think>Hm.</think>Yes."


@pytest.mark.parametrize("fields", [{"enable_thinking": False}, {"reasoning_effort": "none"}])
async def test_effort_and_switch_reach_the_template(fields: dict[str, Any]) -> None:
    async with api("Yes.", chat_template=TEMPLATE) as http:
        on = (await http.post(ROUTE, json=ASK | {"explain": True, "reasoning_effort": "high"})).json()["explain"]
        off = (await http.post(ROUTE, json=ASK | {"explain": True} | fields)).json()["explain"]
        own = {"chat_template_kwargs": {"enable_thinking": True}, "explain": True}
        first = (await http.post(ROUTE, json=ASK | fields | own)).json()["explain"]
    assert on["prompts"][0]["text"] == first["prompts"][0]["text"] == "Why?"
    assert off["prompts"][0]["text"] == "Why?<think></think>?"
    assert on["ignored"] == off["ignored"] == []
    async with api("Yes.", chat_template=HARMONY) as http:
        told = (await http.post(ROUTE, json=ASK | {"explain": True, "reasoning_effort": "minimal"})).json()["explain"]
    assert told["prompts"][0]["text"] == "Why?[low]?"


async def test_what_the_template_has_no_variable_for_is_listed() -> None:
    async with api("Yes.", chat_template="{{ messages[-1].content }}") as http:
        fields = {"reasoning_effort": "low", "enable_thinking": True, "explain": True}
        told = (await http.post(ROUTE, json=ASK | fields)).json()["explain"]
        refused = await http.post(ROUTE, json=ASK | {"thinking_token_budget": 5})
    assert [one["field"] for one in told["ignored"]] == ["enable_thinking", "reasoning_effort"]
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "thinking_token_budget"


async def test_thoughts_of_earlier_turns_are_shown_to_templates_that_want_them() -> None:
    said = [{"role": "assistant", "content": "No.", "reasoning": "Hm."}]
    async with api("Yes.", chat_template=TEMPLATE) as http:
        fields = {"messages": said + ASK["messages"], "explain": True}
        told = (await http.post(ROUTE, json=ASK | fields)).json()["explain"]
    assert told["prompts"][0]["text"] == "<think>Hm.</think>No.Why?"


@pytest.mark.parametrize("name", ["thinking_token_budget", "thinking_budget"])
@pytest.mark.parametrize(("special", "added"), [(THINK, ()), ((), THINK)])
async def test_thoughts_are_bounded_by_a_budget(name: str, special: Sequence[str], added: Sequence[str]) -> None:
    async with api(
        "<think>" + "Hm. " * 20 + "</think>Yes.", chat_template=TEMPLATE, special=special, added=added
    ) as http:
        bounded = await http.post(ROUTE, json=ASK | {name: 7, "max_tokens": 30})
        none = await http.post(ROUTE, json=ASK | {name: 0, "max_tokens": 30})
        free = await http.post(ROUTE, json=ASK | {name: -1})
    assert message(bounded)["reasoning_content"] == "Hm. Hm."
    assert message(bounded)["content"]
    assert "reasoning_content" not in message(none)
    assert message(free)["content"] == "Yes."


async def test_a_shape_is_the_answers_and_not_the_thoughts() -> None:
    shape = {"response_format": {"type": "json_object"}, "temperature": 0}
    for text, template, special in (
        ("<think>Hm.</think>{}", TEMPLATE, THINK),
        (HARMONIOUS.replace("Yes.", "{}"), HARMONY, MARKS),
    ):
        async with api(text, chat_template=template, special=special) as http:
            made = message(await http.post(ROUTE, json=ASK | shape))
        assert made == {"role": "assistant", "reasoning_content": "Hm.", "content": "{}"}


async def test_calls_are_found_behind_thoughts() -> None:
    call = '<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'
    async with api(f"<think>Hm. {call}</think>{call}", chat_template=TEMPLATE, special=THINK) as http:
        made = message(await http.post(ROUTE, json=ASK | {"tools": [LOOK]}))
    assert made["reasoning_content"] == f"Hm. {call}"
    assert [made_call["function"] for made_call in made["tool_calls"]] == [
        {"name": "look", "arguments": '{"at": "it"}'}
    ]


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_harmony_calls_come_as_calls(choice: str) -> None:
    text = (
        HARMONIOUS[: HARMONIOUS.index("final")] + 'commentary to=functions.look <|constrain|>json<|message|>{"at":"it"}'
    )
    fields = {"tools": [LOOK], "tool_choice": choice, "temperature": 0}
    async with api(text, chat_template=HARMONY, special=(*MARKS, "<|constrain|>", "<|call|>", "<|return|>")) as http:
        made = message(await http.post(ROUTE, json=ASK | fields))
    assert made["reasoning_content"] == "Hm."
    assert [call["function"]["name"] for call in made["tool_calls"]] == ["look"]
    assert json.loads(made["tool_calls"][0]["function"]["arguments"]) == {"at": "it"}
    assert made["content"] is None
