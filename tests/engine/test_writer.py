"""Tokens become deltas by the request's rules, and the same tokens become the same deltas again."""

import pytest
from fakes import BOS, END_OF_TURN, EOS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.text.banned_strings import MAX_TRIES
from tightrope.engine.types import Delta, GenerateRequest, StopRules, TextPrompt, TopToken
from tightrope.engine.writer import Writer

pytestmark = pytest.mark.quick


def make_writer(*, banned: tuple[str, ...] = (), max_tokens: int = 100, skip: bool = True, **stop: object) -> Writer:
    """A writer of these rules; further fields are of StopRules."""
    request = GenerateRequest(
        "r",
        TextPrompt(()),
        SamplingParams(banned_strings=banned),
        StopRules(**stop),  # type: ignore[arg-type]
        skip_special_tokens=skip,
    )
    return Writer(request, 0, ByteTokenizer(), max_tokens)


def write(writer: Writer, token_ids: list[int]) -> list[Delta]:
    """The deltas of these tokens, up to the end if there is one among them."""
    deltas: list[Delta] = []
    for token_id in token_ids:
        if not writer.is_finished:
            deltas += writer.take(token_id)
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token.token_id for delta in deltas for token in delta.tokens]


@pytest.mark.parametrize(
    ("stop", "text", "reason", "matched"),
    [
        ({}, "Hi there", "eos", EOS),
        ({"strings": (" th",)}, "Hi", "stop_string", " th"),
        ({"strings": (" th",), "keep_stop_text": True}, "Hi th", "stop_string", " th"),
        ({"strings": ("H",), "min_tokens": 3}, "Hi there", "eos", EOS),
        ({"max_tokens": 2}, "Hi", "length", None),
        ({"max_tokens": 9}, "Hi there", "eos", EOS),
        ({"max_tokens": 9, "length_first": True}, "Hi there", "length", None),
        ({"max_tokens": 5, "strings": (" th",), "length_first": True}, "Hi", "length", None),
        ({"max_tokens": 4, "strings": (" th",)}, "Hi t", "length", None),
        ({"token_ids": (ord("t"),)}, "Hi ", "stop_token", ord("t")),
    ],
)
def test_an_answer_ends_by_the_rule_that_comes_first(
    stop: dict[str, object], text: str, reason: str, matched: str | int | None
):
    deltas = write(make_writer(**stop), [*b"Hi there", EOS])  # type: ignore[arg-type]

    assert text_of(deltas) == text
    assert [delta.finish is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert deltas[-1].finish is not None
    assert (deltas[-1].finish.reason, deltas[-1].finish.matched) == (reason, matched)
    assert deltas[-1].finish.num_tokens == len(ids_of(deltas))


def test_a_complete_grammar_ends_the_answer_with_no_token_of_its_own():
    writer = make_writer()
    writer.take(ord("{"))
    (last,) = writer.take(ord("}"), is_complete=True)

    assert last.finish is not None
    assert (last.text, last.finish.reason, last.finish.num_tokens) == ("}", "eos", 2)


def test_ends_that_would_be_too_early_or_are_ignored_may_not_come():
    early, ignoring = make_writer(min_tokens=1, token_ids=(7, -1, 10_000)), make_writer(ignore_eos=True)

    assert set(early.excluded()) == {EOS, END_OF_TURN, 7}
    early.take(ord("a"))
    assert early.excluded() == ()
    ignoring.take(ord("a"))
    assert set(ignoring.excluded()) == {EOS, END_OF_TURN}


def test_special_tokens_are_listed_and_shown_only_where_they_are_not_skipped():
    for skip, text in ((True, "ab"), (False, "a<s>b")):
        deltas = write(make_writer(skip=skip), [ord("a"), BOS, ord("b")])
        assert text_of(deltas) == text
        assert ids_of(deltas) == [ord("a"), BOS, ord("b")]


def test_a_token_is_told_with_what_was_likely_at_its_place():
    (delta,) = make_writer().take(ord("a"), -0.5, ((ord("a"), -0.5), (EOS, -1.5)))

    assert delta.tokens[0].logprob == -0.5
    assert delta.tokens[0].top == (TopToken(ord("a"), b"a", -0.5, False), TopToken(EOS, b"</s>", -1.5, True))


def test_a_banned_string_is_taken_back_to_where_it_began_and_may_not_begin_there_again():
    writer = make_writer(banned=("no",))
    before = write(writer, [*b"I say ", ord("n")])

    after = writer.take(ord("o"))

    assert text_of(before + after) == "I say "
    assert ids_of(before + after) == [*b"I say "]
    assert writer.num_tokens == len("I say ")
    assert writer.excluded() == (ord("n"),)
    assert text_of(write(writer, [*b"yes", EOS])) == "yes"


def test_an_answer_ends_with_an_error_when_every_way_on_is_banned():
    writer = make_writer(banned=("x",))
    for _ in range(MAX_TRIES - 1):
        assert text_of(writer.take(ord("x"))) == ""
        assert not writer.is_finished

    (last,) = writer.take(ord("x"))

    assert last.finish is not None
    assert (last.finish.reason, last.finish.num_tokens, last.tokens) == ("error", 0, ())


rules = st.fixed_dictionaries(
    {
        "strings": st.lists(st.sampled_from(["ab", "ba", "é", "aab"]), max_size=2).map(tuple),
        "keep_stop_text": st.booleans(),
        "min_tokens": st.sampled_from([0, 3]),
        "max_tokens": st.sampled_from([100, 5]),
        "length_first": st.booleans(),
        "banned": st.lists(st.sampled_from(["aa", "bc", "É", "cab"]), max_size=2).map(tuple),
        "skip": st.booleans(),
    }
)
token_lists = st.lists(st.sampled_from([*b"abcabc", *"é".encode(), BOS, EOS]), max_size=40)


@given(rules, token_lists)
def test_the_tokens_that_were_given_out_are_enough_to_write_an_answer_again(
    rules: dict[str, object], token_ids: list[int]
):
    first, again = make_writer(**rules), make_writer(**rules)  # type: ignore[arg-type]
    deltas = write(first, token_ids)
    is_cut_short = not first.is_finished  # then the last deltas are those of an end that came without a token
    if is_cut_short:
        deltas += first.end("length")

    rewritten = write(again, ids_of(deltas))
    if is_cut_short:
        rewritten += again.end("length")

    assert (text_of(rewritten), ids_of(rewritten)) == (text_of(deltas), ids_of(deltas))
    assert rewritten[-1].finish == deltas[-1].finish
    if not (is_cut_short and rules["banned"]):
        assert [d for d in rewritten if d.tokens or d.finish] == [d for d in deltas if d.tokens or d.finish]
