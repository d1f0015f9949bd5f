"""Tool calls in what a model writes: every family's, found as early as can be, and the same however the text is cut."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replies import Calls, read
from test_grammar import GRAMMARS, say

from tightrope.engine.types import Grammar
from tightrope.server.replies.calls.find import HERMES, LLAMA, call_form
from tightrope.server.replies.calls.form import CallForm
from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, Content
from tightrope.server.replies.form import ReplyPlan, reply_form
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.tools_in_words import with_tool_text

pytestmark = pytest.mark.quick

FUNCTIONS = {"add": {}, "get_weather": {}}
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call></tool_call>",
    "llama": '{{ tools }} {"name": function name, "parameters": dictionary}',
}
PLANS = {name: ReplyPlan(reply_form(template), "outside", functions=FUNCTIONS) for name, template in TEMPLATES.items()}

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}\\"]"}]}}\n</tool_call>'
ADDED = ("add", '{"a": 1, "b": [2, {"c": "}\\"]"}]}')
CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Hello <there> & <tool", "Hello <there> & <tool", []),
    ("hermes", ADD, "", [ADDED]),
    ("hermes", f"Let me see.\n{ADD}\n{ADD}\n", "Let me see.\n", [ADDED, ADDED]),
    ("hermes", f"{ADD} and so on", "and so on", [ADDED]),
    ("hermes", '<tool_call>{"name":"get_weather","arguments":{}}</tool_call>', "", [("get_weather", "{}")]),
    ("hermes", '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>[{"name": "add", "arguments": {}}]</tool_call>ok', "ok", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ("hermes", "<tool_call>what?</tool_call> no", "<tool_call>what?</tool_call> no", []),
    ("hermes", '<tool_call>{"name": "add", "arg', '<tool_call>{"name": "add", "arg', []),
    ("llama", "Hello {", "Hello {", []),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ("llama", '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ("llama", '{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}', "", [("add", "{}")] * 2),
    ("llama", '\n{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ("llama", '{"name": "add", "parameters": {"a": 1', "", [("add", '{"a": 1')]),
    ("llama", '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", "{not json", "{not json", []),
]  # fmt: skip
IDS = [f"{family}-{number}" for number, (family, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("family", "text", "content", "calls"), CASES, ids=IDS)
def test_calls_are_told_from_text(family: str, text: str, content: str, calls: Calls):
    assert read(PLANS[family], text) == ("", content, calls)


@pytest.mark.parametrize(("family", "text", "content", "calls"), [case for case in CASES if case[3]])
def test_a_cut_call_leaks_no_mark(family: str, text: str, content: str, calls: Calls):
    for end in range(len(text)):
        thought, some_content, some_calls = read(PLANS[family], text[:end], is_cut=True)
        assert thought == ""
        assert content.startswith(some_content)
        for (name, arguments), (some_name, some_arguments) in zip(calls, some_calls, strict=False):
            assert name == some_name
            assert arguments.startswith(some_arguments)


pieces = st.sampled_from(
    [
        "\n",
        " ",
        "}",
        "]",
        "[",
        ",",
        '"',
        "{",
        "hello ",
        "<tool",
        '{"x',
        '{"name": "add", "arguments": ',
        '{"a": "x}"}',
        ADD,
    ]
    + [mark for plan in PLANS.values() for mark in plan.marks]
    + [text for _, text, _, _ in CASES]
)


@given(st.lists(pieces, max_size=8).map("".join), st.sampled_from(sorted(PLANS)), st.booleans())
def test_cuts_change_nothing(text: str, family: str, is_cut: bool):
    read(PLANS[family], text, is_cut=is_cut)


def test_text_and_arguments_come_out_while_they_are_written():
    reader = PLANS["hermes"].reader()
    assert reader is not None
    assert reader.feed("I look <t") == [Content("I look ")]
    assert reader.feed('ool_call>{"name": "add", ') == []
    begin, arguments = reader.feed('"arguments": {"a"')
    assert isinstance(begin, CallBegin)
    assert re.fullmatch("call_[0-9a-f]{24}", begin.call_id)
    assert arguments == CallArguments(0, '{"a"')
    assert reader.feed(": 12}") == [CallArguments(0, ": 12}"), CallEnd(0)]
    assert reader.feed("}</tool_call>") == []


def test_one_call_is_told_where_one_is_wanted():
    plan = ReplyPlan(reply_form(TEMPLATES["hermes"]), "outside", functions=FUNCTIONS, one_call=True)
    assert read(plan, f"a{ADD}\n{ADD}b") == ("", "ab", [ADDED])


def test_the_template_tells_how_its_model_writes_calls():
    assert call_form(TEMPLATES["hermes"]) is HERMES
    assert call_form(TEMPLATES["llama"]) is LLAMA
    assert call_form("{{ messages }}") is HERMES


def test_a_template_without_tools_gets_them_in_words():
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    system, user, assistant, result = with_tool_text(chat, [tool])
    assert system["content"].startswith("Be brief.\n\n")
    assert json.dumps(tool["function"]) in system["content"]
    assert user == chat[1]
    assert read(PLANS["hermes"], assistant["content"]) == ("", "", [("add", '{"a": 1}')])
    assert result == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}
    assert with_tool_text(chat[1:2], [tool])[0]["role"] == "system"
    assert with_tool_text(chat[:2], []) == chat[:2]


SCHEMA = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORCED = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>',
    "llama": '{"name": "add", "parameters": {"a": 12}}',
}


def forms(family: str) -> CallForm:
    return reply_form(TEMPLATES[family]).calls


@pytest.mark.parametrize("family", FORCED)
@pytest.mark.parametrize("one_call", [True, False])
def test_a_forced_call_and_a_free_one_are_what_the_reader_reads(family: str, one_call: bool):
    form, call, functions = forms(family), FORCED[family], {"add": SCHEMA, "get_weather": {}}
    assert read(PLANS[family], call) == ("", "", [("add", '{"a": 12}')])
    texts = (form.forced(functions, Spelling(), one_call=one_call), form.free(functions, Spelling(), one_call=one_call))
    for text in texts:
        assert say(GRAMMARS.matcher(Grammar("lark", text, "tools")), call)
        wrong = call.replace("12", "true")
        assert not say(GRAMMARS.matcher(Grammar("lark", text, "tools")), wrong)
    assert not say(GRAMMARS.matcher(Grammar("lark", texts[0], "tools")), "Hello")
    assert say(GRAMMARS.matcher(Grammar("lark", texts[1], "tools")), "Hello, 1 < 2 {")
