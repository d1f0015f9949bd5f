"""Tool calls in what a model writes: every family's, found as early as can be, and the same however the text is cut."""

import json
import re

import pytest
from fakes import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st
from replies import Calls, events_of, read
from test_grammar import allowed, may_end

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.grammar import Grammars
from tightrope.engine.types import Grammar
from tightrope.server.replies.call_ids import with_short_ids
from tightrope.server.replies.calls.find import HERMES, LLAMA, call_form
from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, Content
from tightrope.server.replies.form import ReplyPlan, reply_form
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.tools_in_words import with_tool_text

pytestmark = pytest.mark.quick

FUNCTIONS: dict[str, dict[str, object]] = {
    "add": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"anyOf": [{"type": "boolean"}]}}},
    "get_weather": {},
}
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call></tool_call>",
    "llama": '{{ tools }} {"name": function name, "parameters": dictionary}',
    "pythonic": "{{ tools }} [func_name1(params_name1=params_value1), func_name2(params)]",
    "qwen coder": "{{ tools }}<tool_call>\n<function=NAME>\n<parameter=KEY>\n",
    "bare functions": "{{ tools }}<function=NAME>\n<parameter=KEY>\n",
    "glm": "{{ tools }}<tool_call>NAME\n<arg_key>KEY</arg_key>",
    "mistral list": "{{ tools }}[TOOL_CALLS] [",
    "mistral names": "{{ tools }}[TOOL_CALLS]NAME[ARGS]",
    "deepseek v3": "{{ tools }}<｜tool▁calls▁begin｜>function<｜tool▁sep｜>NAME\n```json",
    "deepseek": "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
    "deepseek v3.2": "{{ tools }}<｜DSML｜function_calls>",
    "deepseek v4": "{{ tools }}<｜DSML｜tool_calls>",
    "minimax": '{{ tools }}<minimax:tool_call><invoke name="',
    "kimi": "{{ tools }}<|tool_calls_section_begin|><|tool_call_begin|>",
    "functools": "{{ tools }}functools[",
    "phi": "{{ tools }}<|tool_call|><|/tool_call|>",
    "granite": "{{ tools }}<|tool_call|>",
    "command": "{{ tools }}<|START_ACTION|><|END_ACTION|>",
    "function gemma": "{{ tools }}<start_function_call>",
    "gemma 4": "{{ tools }}<|tool_call>call",
    "harmony": "{{ tools }}<|channel|>commentary<|message|>",
}
PLANS = {name: ReplyPlan(reply_form(template), "outside", functions=FUNCTIONS) for name, template in TEMPLATES.items()}

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}\\"]"}]}}\n</tool_call>'
ADDED = ("add", '{"a": 1, "b": [2, {"c": "}\\"]"}]}')
CODER = (
    "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx)'\n</parameter>\n"
    "<parameter=c>\nTrue\n</parameter>\n</function>"
)
TYPED = ("add", '{"a": 1, "b": "x)\'", "c": true}')
CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Hello <there> & <tool", "Hello <there> & <tool", []),
    ("hermes", ADD, "", [ADDED]),
    ("hermes", f"Let me see.\n{ADD}\n{ADD}\n", "Let me see.\n", [ADDED, ADDED]),
    ("hermes", f"{ADD} and so on", "and so on", [ADDED]),
    ("hermes", f"{ADD.removesuffix('</tool_call>')}{ADD}", "", [ADDED, ADDED]),
    ("hermes", f"{ADD.removesuffix(chr(10) + '</tool_call>')}}}\n</tool_call>{ADD}", "", [ADDED, ADDED]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"b": "naïve 😀 \\u00e9 \\n", "a": {"x": [[], {}]}}}'
     "</tool_call>", "", [("add", '{"b": "naïve 😀 \\u00e9 \\n", "a": {"x": [[], {}]}}')]),
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
    ("pythonic", "[add(a=1, b='x)\\'', c=True), get_weather()] ok", "ok", [TYPED, ("get_weather", "{}")]),
    ("pythonic", '<|python_start|>[add(a=1, b="x)\'", c=true)]<|python_end|>', "", [TYPED]),
    ("pythonic", "[Scene: a harbour] Hello", "[Scene: a harbour] Hello", []),
    ("pythonic", "[add(1)]", "[add(1)]", []),
    ("qwen coder", f"So.\n<tool_call>\n{CODER}\n</tool_call>\n<tool_call>{CODER}</tool_call>", "So.\n", [TYPED] * 2),
    ("qwen coder", f"{CODER} and", "and", [TYPED]),
    ("qwen coder", "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>", "", [("get_weather", "{}")]),
    ("qwen coder", "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
     "<tool_call>\n<function=rm>\n</function>\n</tool_call>", []),
    ("qwen coder", "<tool_call>what</tool_call> no", "<tool_call>what</tool_call> no", []),
    ("bare functions", CODER, "", [TYPED]),
    ("glm", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>x)'"
     "</arg_value>\n<arg_key>c</arg_key><arg_value>true</arg_value>\n</tool_call>", "", [TYPED]),
    ("glm", "<tool_call>get_weather\n</tool_call>ok", "ok", [("get_weather", "{}")]),
    ("glm", "<tool_call>rm</tool_call>", "<tool_call>rm</tool_call>", []),
    ("mistral list", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}, '
     '{"name": "get_weather", "arguments": {}}]', "", [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ("mistral list", '[TOOL_CALLS]add[ARGS]{"a": 1}', "", [("add", '{"a": 1}')]),
    ("mistral names", 'So.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{}', "So.",
     [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ("mistral names", '[TOOL_CALLS]add{"a": 1}', "", [("add", '{"a": 1}')]),
    ("mistral names", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "", [("add", '{"a": 1}')]),
    ("mistral names", "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    ("deepseek v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{\"a\": 1}\n```"
     "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}\n```<｜tool▁call▁end｜>"
     "<｜tool▁calls▁end｜>", "", [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ("deepseek", "So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜>"
     "<｜tool▁calls▁end｜>", "So.", [("add", '{"a": 1}')]),
    ("deepseek", "<｜tool▁call▁begin｜>rm<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
     "<｜tool▁call▁begin｜>rm<｜tool▁sep｜>{}<｜tool▁call▁end｜>", []),
    ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{\"a\": 1}"
     "<|tool_call_end|><|tool_calls_section_end|>", "", [("add", '{"a": 1}')]),
    ("functools", 'functools[{"name": "add", "arguments": {"a": 1}}]', "", [("add", '{"a": 1}')]),
    ("phi", '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>', "", [("add", '{"a": 1}')]),
    ("granite", '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]', "", [("add", '{"a": 1}')]),
    ("command", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}}]<|END_ACTION|>', "",
     [("add", '{"a": 1}')]),
    ("minimax", 'So.<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
     '<parameter name="b">x)\'</parameter>\n<parameter name="c">true</parameter>\n</invoke>\n'
     '<invoke name="get_weather">\n</invoke>\n</minimax:tool_call>', "So.", [TYPED, ("get_weather", "{}")]),
    ("minimax", '<minimax:tool_call>\n<invoke name="rm">\n</invoke>\n</minimax:tool_call>',
     '<minimax:tool_call>\n<invoke name="rm">\n</invoke>\n</minimax:tool_call>', []),
    ("deepseek v3.2", 'So.<｜DSML｜function_calls>\n<｜DSML｜invoke name="add">\n'
     '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="b" string="true">x)\'</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="c" string="false">true</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
     '<｜DSML｜invoke name="get_weather">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>', "So.",
     [TYPED, ("get_weather", "{}")]),
    ("deepseek v4", '<｜DSML｜tool_calls><｜DSML｜invoke name="add">'
     '<｜DSML｜parameter name="b" string="true">7</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜tool_calls>', "",
     [("add", '{"b": "7"}')]),
    ("function gemma", "<start_function_call>call:add{a:1,b:<escape>x)'<escape>,c:true}<end_function_call>", "",
     [TYPED]),
    ("gemma 4", "<|tool_call>call:add{a:1,b:<|\"|>x)'<|\"|>,c:true}<tool_call|>"
     "<|tool_call>call:get_weather{}<tool_call|>", "", [TYPED, ("get_weather", "{}")]),
    ("gemma 4", "<|tool_call>call:add{a:[1,{b:<|\"|>}<|\"|>}],c:null}<tool_call|>", "",
     [("add", '{"a": [1, {"b": "}"}], "c": null}')]),
    ("gemma 4", "<|tool_call>call:rm{}<tool_call|>", "<|tool_call>call:rm{}<tool_call|>", []),
    ("harmony", '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>', "",
     [("add", '{"a": 1}')]),
    ("harmony", ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}', "", [("add", '{"a": 1}')]),
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


SCHEMA = {
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}, "t": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON = '{"a":12,"b":"x","t":"z"}'
FORCED = {
    "hermes": f'<tool_call>\n{{"name": "add", "arguments": {JSON}}}\n</tool_call>',
    "llama": f'{{"name": "add", "parameters": {JSON}}}',
    "pythonic": '[add(a=12, b="x", t="z")]',
    "qwen coder": "<tool_call>\n<function=add>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\nx\n</parameter>\n"
    "<parameter=t>\nz\n</parameter>\n</function>\n</tool_call>",
    "bare functions": "<function=add>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\nx\n</parameter>\n"
    "<parameter=t>\nz\n</parameter>\n</function>",
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>12</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>x</arg_value>\n<arg_key>t</arg_key>\n<arg_value>z</arg_value>\n</tool_call>",
    "mistral list": f'[TOOL_CALLS][{{"name": "add", "arguments": {JSON}}}]',
    "mistral names": f"[TOOL_CALLS]add[ARGS]{JSON}",
    "deepseek v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    f"{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    f"{JSON}<|tool_call_end|><|tool_calls_section_end|>",
    "deepseek v3.2": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="add">\n'
    '<｜DSML｜parameter name="a" string="false">12</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="true">x</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="t" string="true">z</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "deepseek v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n'
    '<｜DSML｜parameter name="a" string="false">12</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="true">x</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="t" string="true">z</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    "minimax": '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">12</parameter>\n'
    '<parameter name="b">x</parameter>\n<parameter name="t">z</parameter>\n</invoke>\n</minimax:tool_call>',
    "functools": f'functools[{{"name": "add", "arguments": {JSON}}}]',
    "phi": f'<|tool_call|>[{{"name": "add", "arguments": {JSON}}}]<|/tool_call|>',
    "granite": f'<|tool_call|>[{{"name": "add", "arguments": {JSON}}}]',
    "command": f'<|START_ACTION|>[{{"tool_name": "add", "parameters": {JSON}}}]<|END_ACTION|>',
    "function gemma": "<start_function_call>call:add{a:12,b:<escape>x<escape>,t:<escape>z<escape>}<end_function_call>",
    "gemma 4": '<|tool_call>call:add{a:12,b:<|"|>x<|"|>,t:<|"|>z<|"|>}<tool_call|>',
    "harmony": f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{JSON}",
}


def test_every_family_is_here():
    assert FORCED.keys() == TEMPLATES.keys() == {family for family, *_ in CASES}


@pytest.mark.parametrize("family", FORCED)
@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("one_call", [True, False])
def test_a_forced_call_is_written_in_the_familys_own_form_and_valid(family: str, is_special: bool, one_call: bool):
    """A free model's strict call is, too. Marks may be special tokens, or texts."""
    form, call, functions = PLANS[family].form.calls, FORCED[family], {"add": SCHEMA, "get_weather": {}}
    (made,) = read(PLANS[family], call)[2]
    assert (made[0], json.loads(made[1])) == ("add", {"a": 12, "b": "x", "t": "z"})
    tokenizer = ByteTokenizer(special=form.marks if is_special else ())
    ids = {mark: tokenizer.encode(mark, parse_special=True, is_start=False)[0] for mark in form.marks}
    grammars, spelling = Grammars(tokenizer), Spelling(ids if is_special else {})

    def says(lark: str, text: str) -> bool:
        matcher = grammars.matcher(Grammar("lark", lark, "tools"))
        for token_id in tokenizer.encode(text, parse_special=True, is_start=False):
            if token_id not in allowed(matcher):
                return False
            matcher.append(token_id)
        return may_end(matcher)

    def with_texts(**bounds: object) -> str:
        """The grammar in which the text `t` has these."""
        text = {"t": {"type": "string", **bounds}}
        schema = SCHEMA | {"properties": SCHEMA["properties"] | text}
        return form.forced({"add": schema}, spelling, one_call=one_call)

    head, _, tail = call.rpartition("z")
    for bounds, right, wrong in (
        ({"maxLength": 2}, ("z", "zz"), ("zzz",)),
        ({"minLength": 2, "maxLength": 3}, ("zz",), ("z", "zzzz")),
        ({"pattern": "^[a-y]+$"}, ("ab",), ("z", "")),
    ):
        for text in (*right, *wrong):
            assert says(with_texts(**bounds), head + text + tail) is (text in right), (bounds, text)

    forced = form.forced(functions, spelling, one_call=one_call)
    free = form.free(functions, spelling, one_call=one_call)
    for lark in (forced, free):
        assert says(lark, call)
        assert not says(lark, call.replace("12", "true"))
        head, _, tail = call.rpartition("x")
        assert not says(lark, f"{head}w{tail}")
        assert not says(lark, call.replace("add", "rm"))
    assert not says(forced, "Hello")
    if family != "harmony":
        assert says(free, "Hello, 1 < 2 {")


@pytest.mark.parametrize("family", ["function gemma", "gemma 4"])
def test_gemmas_lists_have_as_many_items_as_the_schema_says(family: str):
    form = PLANS[family].form.calls
    tokenizer = ByteTokenizer()
    grammars = Grammars(tokenizer)
    for bounds, right in (
        ({"minItems": 2, "maxItems": 3}, (2, 3)),
        ({"maxItems": 1}, (0, 1)),
        ({"minItems": 1}, (1, 4)),
    ):
        items = {"type": "array", "items": {"type": "integer"}, **bounds}
        functions = {"add": {"properties": {"a": items}, "required": ["a"]}}
        matcher = grammars.matcher(Grammar("lark", form.forced(functions, Spelling(), one_call=True), "tools"))
        for number in range(5):
            numbers = ",".join("1" * number)
            text = f"{form.opening}call:add{{a:[{numbers}]}}{form.closing}"
            one = matcher.fork()
            for token_id in tokenizer.encode(text, parse_special=False, is_start=False):
                one.append(token_id)
            assert (one.error is None) is (right[0] <= number and (number <= right[1] or right[1] == 4)), (
                bounds,
                number,
            )
    with pytest.raises(InvalidRequest, match="tools: prefixItems of a can't be enforced"):
        form.forced({"add": {"properties": {"a": {"type": "array", "prefixItems": []}}}}, Spelling(), one_call=True)


def test_ids_are_those_that_the_template_takes():
    ids = {}
    for family, call in FORCED.items():
        begin = next(event for event in events_of(PLANS[family], [call]) if isinstance(event, CallBegin))
        ids[family] = begin.call_id
    assert re.fullmatch("[a-zA-Z0-9]{9}", ids["mistral list"])
    assert re.fullmatch("[a-zA-Z0-9]{9}", ids["mistral names"])
    assert ids["kimi"] == "functions.add:0"
    assert re.fullmatch("call_[0-9a-f]{24}", ids["hermes"])
    short = reply_form("{% if call.id | length != 9 %}<tool_call>")
    assert len(short.made_id("add", 0)) == 9


def test_ids_in_the_history_become_those_that_the_template_takes():
    call = {"id": "call_0123456789", "type": "function", "function": {"name": "add", "arguments": {}}}
    chat = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_0123456789"}]
    assistant, result = with_short_ids(chat)
    assert re.fullmatch("[a-zA-Z0-9]{9}", result["tool_call_id"])
    assert assistant["tool_calls"][0]["id"] == result["tool_call_id"]
    kept = [{"role": "tool", "tool_call_id": "abcdefghi"}]
    assert with_short_ids(kept) == kept
