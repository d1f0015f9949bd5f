"""Tool calls in what a model writes: found as early as can be, and the same however the text is cut."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tightrope.engine.types import Grammar
from tightrope.server.chats.call_format import HERMES, LLAMA, CallFormat, call_format, with_tool_text
from tightrope.server.chats.call_parser import Arguments, CallOpened, CallParser, Piece

pytestmark = pytest.mark.quick

NAMES = frozenset({"add", "get_weather"})
Calls = list[tuple[str, str]]


def joined(pieces: list[Piece]) -> tuple[str, Calls]:
    """The text, and the calls with their arguments."""
    text, calls = "", list[list[str]]()
    for piece in pieces:
        match piece:
            case str():
                text += piece
            case CallOpened(index=index, name=name):
                assert index == len(calls)
                calls.append([name, ""])
            case Arguments(index=index, text=more):
                calls[index][1] += more
    return text, [(name, arguments) for name, arguments in calls]


def read(text: str, written: CallFormat = HERMES, cuts: list[int] | None = None) -> tuple[str, Calls]:
    parser = CallParser(written, NAMES)
    edges = [0, *sorted(cuts or []), len(text)]
    pieces = [piece for start, end in pairwise(edges) for piece in parser.feed(text[start:end])]
    return joined([*pieces, *parser.finish()])


ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}\\"]"}]}}\n</tool_call>'
ADDED = ("add", '{"a": 1, "b": [2, {"c": "}\\"]"}]}')
HERMES_CASES: list[tuple[str, tuple[str, Calls]]] = [
    ("Hello <there> & <tool", ("Hello <there> & <tool", [])),
    (ADD, ("", [ADDED])),
    (f"Let me see.\n{ADD}\n{ADD}\n", ("Let me see.\n", [ADDED, ADDED])),
    (f"{ADD} and so on", ("and so on", [ADDED])),
    ('<tool_call>{"name":"get_weather","arguments":{}}</tool_call>', ("", [("get_weather", "{}")])),
    ('<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>', ("", [("add", '{"a": 1}')])),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("add", '{"a": 1}')])),
    ('<tool_call>{"name": "add"}</tool_call>', ("", [("add", "{}")])),
    ('<tool_call>{"name": "add", "arguments": {"a": 1', ("", [("add", '{"a": 1')])),
    ('<tool_call>{"name": "add", "arguments": {"a": 1}', ("", [("add", '{"a": 1}')])),
    (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ),
    ("<tool_call>what?</tool_call> no", ("<tool_call>what?</tool_call> no", [])),
    ('<tool_call>{"name": "add", "arg', ('<tool_call>{"name": "add", "arg', [])),
]
LLAMA_CASES: list[tuple[str, tuple[str, Calls]]] = [
    ("Hello {", ("Hello {", [])),
    ('{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    ('\n{"type": "function", "name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    ('{"name": "add", "parameters": {"a": 1', ("", [("add", '{"a": 1')])),
    ('{"name": "rm", "parameters": {}}', ('{"name": "rm", "parameters": {}}', [])),
    ('{"answer": 42}', ('{"answer": 42}', [])),
    ("{not json", ("{not json", [])),
]


@pytest.mark.parametrize(("text", "expected"), HERMES_CASES)
def test_marked_calls_are_told_from_text(text: str, expected: tuple[str, Calls]):
    assert read(text) == expected
    assert read(text, cuts=list(range(len(text)))) == expected


@pytest.mark.parametrize(("text", "expected"), LLAMA_CASES)
def test_bare_calls_are_told_from_text(text: str, expected: tuple[str, Calls]):
    assert read(text, LLAMA) == expected
    assert read(text, LLAMA, list(range(len(text)))) == expected


pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "\n",
        '{"name": "add", "arguments": ',
        '{"a": "x}"}',
        "}",
        "hello ",
        "<tool",
        '{"x',
        ADD,
    ]
)


@given(
    st.lists(pieces, max_size=8).map("".join),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from([HERMES, LLAMA]),
)
@example(ADD, [3, 20, 50], HERMES)
def test_cuts_change_nothing(text: str, cuts: list[int], written: CallFormat):
    assert read(text, written, [min(cut, len(text)) for cut in cuts]) == read(text, written)


def test_text_and_arguments_come_out_while_they_are_written():
    parser = CallParser(HERMES, NAMES)
    assert parser.feed("I look <t") == ["I look "]
    assert parser.feed('ool_call>{"name": "add", ') == []
    opened, arguments = parser.feed('"arguments": {"a"')
    assert isinstance(opened, CallOpened)
    assert re.fullmatch("call_[0-9a-f]{24}", opened.call_id)
    assert arguments == Arguments(0, '{"a"')
    assert parser.feed(": 12}") == [Arguments(0, ": 12}")]
    assert parser.feed("}</tool_call>") == []


def test_the_template_tells_how_its_model_writes_calls():
    assert call_format("{% for tool in tools %}<tool_call>{% endfor %}") is HERMES
    assert call_format('{{ tools }} {"name": function name, "parameters": dictionary}') is LLAMA
    assert call_format("{{ messages }}") is HERMES


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
    assert read(assistant["content"]) == ("", [("add", '{"a": 1}')])
    assert result == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}
    assert with_tool_text(chat[1:2], [tool])[0]["role"] == "system"
    assert with_tool_text(chat[:2], []) == chat[:2]


@pytest.mark.parametrize("written", [HERMES, LLAMA])
@pytest.mark.parametrize("one_call", [True, False])
def test_a_forced_call_and_a_free_one_are_what_the_parser_reads(written: CallFormat, one_call: bool):
    from test_grammar import GRAMMARS, say

    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    functions = {"add": schema, "get_weather": {}}
    closing = f"\n{written.closing}" if written.closing else ""
    opening = f"{written.opening}\n" if written.opening else ""
    call = f'{opening}{{"name": "add", "{written.arguments}": {{"a": 12}}}}{closing}'
    assert read(call, written) == ("", [("add", '{"a": 12}')])
    for text in (written.grammar(functions, one_call=one_call), written.free_grammar(functions)):
        assert say(GRAMMARS.matcher(Grammar("lark", text, "tools")), call)
        wrong = call.replace('"a"', '"b"')
        assert not say(GRAMMARS.matcher(Grammar("lark", text, "tools")), wrong)
    forced = GRAMMARS.matcher(Grammar("lark", written.grammar(functions, one_call=one_call), "tools"))
    assert not say(forced, "Hello")
    free = GRAMMARS.matcher(Grammar("lark", written.free_grammar(functions), "tools"))
    assert say(free, "Hello, 1 < 2 {")
