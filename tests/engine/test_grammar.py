"""Grammars: what is allowed next, what is refused and why, and that a walk through the masks obeys the grammar."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from fakes import EOS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.grammar import Grammars, Matcher, masks
from tightrope.engine.types import Grammar, GrammarKind

pytestmark = pytest.mark.quick

TOKENIZER = ByteTokenizer()
GRAMMARS = Grammars(TOKENIZER)
CLOSING = frozenset(b'"}]')


def compiled(kind: GrammarKind, text: str) -> Matcher:
    return GRAMMARS.matcher(Grammar(kind, text, "the_field"))


def schema(value: object) -> Matcher:
    return compiled("json_schema", json.dumps(value))


def allowed(matcher: Matcher) -> set[int]:
    return set(
        np.flatnonzero(np.unpackbits(masks([matcher])[0], count=matcher.num_words * 32, bitorder="little")).tolist()
    )


def say(matcher: Matcher, text: str) -> bool:
    """Append a text, byte by byte; whether the masks allowed all of it."""
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False
        matcher.append(byte)
    return True


def may_end(matcher: Matcher) -> bool:
    return matcher.is_complete or EOS in allowed(matcher)


def accepts(kind: GrammarKind, grammar: str, text: str) -> bool:
    matcher = compiled(kind, grammar)
    return say(matcher, text) and may_end(matcher)


def walk(matcher: Matcher, rng: random.Random, limit: int = 4000) -> str:
    """A random text of the grammar; what closes something is likelier than the rest, so that it ends."""
    said = bytearray()
    while not matcher.is_complete:
        choices = sorted(allowed(matcher))
        assert choices, matcher.error
        closing = [token_id for token_id in choices if token_id in CLOSING or token_id == EOS]
        token_id = rng.choice(closing if closing and rng.random() < 0.3 else choices)
        matcher.append(token_id)
        if token_id >= EOS:
            break
        said.append(token_id)
        assert len(said) < limit, said
    return said.decode()


# ---- what is allowed ----


def test_masks_of_many_are_those_of_each_alone_and_one_that_went_wrong_allows_nothing() -> None:
    matchers = [compiled("regex", "a+b"), compiled("regex", "[0-9]"), compiled("regex", "xy"), compiled("regex", "z")]
    matchers[1].append(ord("q"))  # a token that it excludes
    matchers[3].append(ord("z"))  # complete
    together = [set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()) for mask in masks(matchers)]
    assert together == [allowed(matcher) for matcher in matchers]
    assert together[:3] == [{ord("a")}, set(), {ord("x")}]
    assert masks([]) == []


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a+b", ["ab", "aaab"], ["a", "b", "abb"]),
        ("^abc$", ["abc"], ["ab", "abcd"]),
        ("yes|no", ["yes", "no"], ["yesno", ""]),
        (r"\d{3}-\d{2}", ["123-45"], ["12-345"]),
        ("(a|aa)+c", ["aaac"], ["c"]),
        ("가+", ["가가"], ["나"]),
        ("[^a]", ["b"], ["a"]),
        ("a&b", ["a&b"], ["a", "b"]),
    ],
)
def test_a_regular_expression_matches_the_whole_answer(pattern: str, yes: list[str], no: list[str]):
    assert [accepts("regex", pattern, text) for text in yes] == [True] * len(yes)
    assert [accepts("regex", pattern, text) for text in no] == [False] * len(no)


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_an_answer_is_one_of_the_choices_to_the_letter(choices: list[str], rng: random.Random):
    assert all(accepts("choice", json.dumps(choices), choice) for choice in choices)
    assert walk(compiled("choice", json.dumps(choices)), rng) in choices


GBNF = 'root ::= "<" tag ">" | "-"{2,3}\ntag ::= [a-z]+ ("," tag)?  # names'
LARK = 'start: "<" tag ">" | "-"~2..3\ntag: /[a-z]+/ ("," tag)?  // names'


@pytest.mark.parametrize("grammar", [GBNF, LARK], ids=["gbnf", "lark"])
def test_a_grammar_may_be_gbnf_or_lark(grammar: str):
    assert all(accepts("grammar", grammar, text) for text in ("<a>", "<a,bc>", "--", "---"))
    assert not any(accepts("grammar", grammar, text) for text in ("<>", "<a,>", "-", "----", "<A>"))


def test_an_end_token_may_come_only_where_the_text_is_complete():
    matcher = compiled("regex", "ab?")
    assert EOS not in allowed(matcher)
    matcher.append(ord("a"))
    assert {EOS, ord("b")} <= allowed(matcher)
    assert not matcher.is_complete
    matcher.append(ord("b"))
    assert matcher.is_complete


def test_white_space_in_json_is_a_newline_and_an_indentation_at_most():
    closed = {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False}
    assert say(schema(closed), '{\n  "a" : null}')
    assert not say(schema(closed), "{\n\n")
    assert not say(schema(closed), "{" + " " * 17)


@given(st.integers(0, 2**32), st.data())
def test_going_back_leads_to_where_the_text_was(seed: int, data: st.DataObject):
    matcher, rng = schema({"type": "array", "items": {"enum": ["ab", 12, None]}}), random.Random(seed)
    before, drawn = [], []
    while not matcher.is_complete and len(drawn) < 30:
        before.append(masks([matcher])[0])
        drawn.append(rng.choice(sorted(allowed(matcher) - {EOS})))
        matcher.append(drawn[-1])
    keep = data.draw(st.integers(0, len(drawn) - 1))
    matcher.truncate(keep)
    assert masks([matcher])[0].tolist() == before[keep].tolist()
    matcher.append(drawn[keep])
    assert matcher.num_tokens == keep + 1


def test_forks_go_their_own_ways():
    matcher = compiled("choice", '["aa", "bb"]')
    other = matcher.fork()
    matcher.append(ord("a"))
    assert allowed(matcher) == {ord("a")}
    assert allowed(other) == {ord("a"), ord("b")}


def test_a_token_that_the_mask_excludes_leaves_nothing_to_draw():
    matcher = compiled("regex", "abc")
    matcher.append(ord("x"))
    assert not matcher.is_complete
    assert allowed(matcher) == set()
    assert matcher.error is not None


# ---- what is refused ----

REFUSED: list[tuple[GrammarKind, str, str]] = [
    ("regex", "(a", "unclosed group"),
    ("regex", "a{3,1}", "repetition"),
    ("regex", r"(a)\1", "backreferences are not supported"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"[^\s\S]", "no text satisfies it"),
    ("regex", "(a+)+$", "repeats what is an endless repeat already"),
    ("regex", "((a{1,100000}){1,100000}){1,100000}", "100000 are the most"),
    ("regex", "|".join(f"choice {i}" for i in range(100_000)), "longer than"),
    ("choice", json.dumps([f"choice {i}" for i in range(100_000)]), "longer than"),
    ("grammar", 'root ::= root "a" | "b"', "left recursion: start -> start"),
    ("grammar", 'start: a\na: "x"? b\nb: a | "y"', "left recursion: a -> b -> a"),
    ("grammar", 'start: e a "x" | "y"\na: start\ne: "n"?', "left recursion: start -> a -> start"),
    ("grammar", 'root ::= "a" root', "never comes to an end"),
    ("grammar", "start: /[0-9]/ a\na: b\nb: start", "never comes to an end"),
    ("grammar", 'root ::= ((("a"{1,100000}){1,100000}){1,100000})', "100000 are the most"),
    ("grammar", "start: /(x*)*/", "endless repeat"),
    ("grammar", "root ::= (", "Expected"),
    ("grammar", "start: foo", "unknown name"),
    ("grammar", "start: (", "not closed"),
    ("grammar", "start: " + "(" * 40 + '"a"' + ")" * 40, "nested more than 30 deep"),
    ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deep"),
    ("grammar", 'start: %json {"not": {}}', "%json is not allowed"),
    ("grammar", "start: " + " | ".join(f'"{i}"' for i in range(100_000)), "longer than"),
    ("grammar", "\n".join(f"r{i}: r{i + 1}" for i in range(1000)), "more than 500 rules"),
    ("grammar", "what is this", "Expected token ':'"),
    ("json_schema", "{", "no JSON"),
    ("json_schema", "[]", "a schema is an object"),
    ("json_schema", '{"type": "strin"}', "#: type must be of null"),
    ("json_schema", '{"items": {"type": "string", "maxLenght": 3}}', "#/items: the keyword 'maxLenght'"),
    ("json_schema", '{"anyOf": [true, {"not": {}}]}', "#/anyOf/1: the keyword 'not' can't be enforced"),
    ("json_schema", '{"properties": {"a": {"uniqueItems": true}}}', "#/properties/a: the keyword 'uniqueItems'"),
    ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance"),
    ("json_schema", '{"minimum": 0, "exclusiveMinimum": true}', "exclusiveMinimum must be a number"),
    ("json_schema", '{"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}', "oneOf"),
    ("json_schema", '{"type": "string", "pattern": "(a"}', "no regular expression"),
    ("json_schema", '{"type": "string", "pattern": "(a+)+$"}', "endless repeat"),
    ("json_schema", '{"type": "string", "format": "zzz"}', "format"),
    ("json_schema", '{"$ref": "#/$defs/x"}', "leads to no schema"),
    ("json_schema", '{"$ref": "http://example.com/schema"}', "leads to no schema"),
    ("json_schema", '{"$ref": "#"}', "no finite value satisfies it"),
    ("json_schema", '{"items": {"$ref": "#/a"}, "$defs": {}}', "leads to no schema"),
    (
        "json_schema",
        '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
        "no finite value satisfies it",
    ),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
    ("json_schema", "false", "no finite value satisfies it"),
    (
        "json_schema",
        '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": false}',
        "no finite value satisfies it",
    ),
    ("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(2000)}}), "more than 1000 subschemas"),
    ("json_schema", '{"items":' * 400 + "true" + "}" * 400, "recursion limit"),
    ("json_schema", '{"items":' * 90_000, "longer than"),
    ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(100_000)]}), "longer than"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED, ids=[f"{kind} {text[:40]}" for kind, text, _ in REFUSED])
def test_what_cannot_be_enforced_is_refused_with_the_fields_name_and_a_reason(
    kind: GrammarKind, text: str, reason: str
):
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as refused:
        compiled(kind, text)
    assert refused.value.param == "the_field"
    assert refused.value.message.startswith("the_field: ")
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


# ---- JSON schemas ----

SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 120},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 2},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 8},
        {"type": "string", "minLength": 2, "maxLength": 4},
        {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        {"type": "string", "format": "date"},
        {"enum": ["red", "green", 3, None, {"a": [1]}]},
        {"const": "fixed"},
        {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
    ]
)


def objects(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    def build(properties: dict[str, object], num_required: int) -> object:
        required = list(properties)[:num_required]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(st.sampled_from("abcde"), inner, max_size=3), st.integers(0, 3))


def arrays(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: (
        objects(inner) | arrays(inner) | st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    ),
    max_leaves=5,
)


def by_reference(value: object) -> object:
    return {"$defs": {"one": value}, "type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2}


@given(SCHEMAS | SCHEMAS.map(by_reference), st.randoms(use_true_random=False))
def test_what_the_masks_lead_to_is_valid_under_the_schema(value: dict[str, object], rng: random.Random):
    answer = json.loads(walk(schema(value), rng))
    jsonschema.Draft202012Validator(value).validate(answer)
