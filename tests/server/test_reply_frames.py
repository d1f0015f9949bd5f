"""Grammars of answers with thoughts in front: what is asked for comes behind them, and they end in time."""

import pytest
from fakes import BOS, ByteTokenizer
from test_grammar import allowed, may_end

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.grammar import Grammars, Matcher
from tightrope.engine.types import Grammar
from tightrope.server.replies.form import ReplyPlan, reply_form
from tightrope.server.replies.harmony import MARKS
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.planning import Wishes, framed
from tightrope.server.replies.thoughts import Place

pytestmark = pytest.mark.quick

THINKS = reply_form("<think></think>")
HARMONY = reply_form("<|channel|><|message|>")
SPECIAL = ByteTokenizer(special=["<think>", "</think>", *MARKS])
PLAIN = ByteTokenizer(added=["<think>", "</think>", *MARKS])
LETTERS = ByteTokenizer()
VOCABULARIES = {
    "special": (SPECIAL, Grammars(SPECIAL)),
    "plain": (PLAIN, Grammars(PLAIN)),
    "letters": (LETTERS, Grammars(LETTERS)),
}
YES = Grammar("choice", '["yes", "no"]', "guided_choice")
OBJECT = Grammar("json_schema", '{"type": "object"}', "response_format")


def spelling(kind: str) -> Spelling:
    tokenizer, _ = VOCABULARIES[kind]
    marks = ("<think>", "</think>", *MARKS)
    found = {mark: tokenizer.encode(mark, parse_special=True, is_start=False) for mark in marks}
    ids = {mark: token_ids[0] for mark, token_ids in found.items() if len(token_ids) == 1}
    special = {mark: token_id for mark, token_id in ids.items() if tokenizer.is_special(token_id)}
    return Spelling(special, {mark: token_id for mark, token_id in ids.items() if mark not in special})


def matcher(kind: str, plan: ReplyPlan, grammar: Grammar | None, wishes: Wishes | None = None) -> Matcher:
    made = framed(plan, wishes or Wishes(), grammar, spelling(kind), is_final=True)
    assert made is not None
    return VOCABULARIES[kind][1].matcher(made)


def says(kind: str, matcher_: Matcher, text: str) -> str:
    """How much of a text may be said."""
    tokenizer, _ = VOCABULARIES[kind]
    said = ""
    for token_id in tokenizer.encode(text, parse_special=True, is_start=False):
        if token_id not in set(bits(matcher_)):
            break
        matcher_.append(token_id)
        said += tokenizer.token_bytes(token_id).decode()
    return said


def bits(matcher_: Matcher) -> list[int]:
    return sorted(allowed(matcher_))


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize("grammar", [YES, OBJECT])
@pytest.mark.parametrize(
    ("place", "before", "is_right"),
    [
        ("outside", "<think>Hm. </think>\n\n", True),
        ("outside", "", True),
        ("outside", "Hm. ", False),
        ("inside", "Hm. </think>\n\n", True),
        ("inside", "", True),  # It is all thought, and may not end there.
        ("behind", "", True),
        ("behind", "<think>Hm. </think>", False),
    ],
)
def test_the_shape_that_is_asked_for_comes_behind_thoughts(
    kind: str, grammar: Grammar, place: Place, before: str, is_right: bool
):
    answer = "yes" if grammar is YES else '{"a": 1}'
    made = matcher(kind, ReplyPlan(THINKS, place), grammar)
    said = says(kind, made, before + answer)
    assert (said == before + answer) is is_right
    if is_right:
        assert may_end(made) is (bool(before) or place != "inside")


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_template_that_was_told_not_to_think_leaves_the_shape_alone(kind: str):
    off = Wishes(is_off=True)
    assert says(kind, matcher(kind, ReplyPlan(THINKS, "outside"), YES, off), "<think>") == ""
    assert says(kind, matcher(kind, ReplyPlan(THINKS, "outside"), YES, off), "yes") == "yes"


@pytest.mark.parametrize("kind", ["special", "plain"])
@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize("grammar", [YES, None])
def test_thoughts_end_after_so_many_tokens(kind: str, place: Place, grammar: Grammar | None):
    opening = "<think>" if place == "outside" else ""
    plan, wishes = ReplyPlan(THINKS, place), Wishes(budget=4)
    text = "yes" if grammar else "It is. 1 < 2"
    made = matcher(kind, plan, grammar, wishes)
    assert says(kind, made, f"{opening}too long</think>") == f"{opening}too "
    assert says(kind, made, f"</think>{text}") == f"</think>{text}"
    assert may_end(made)
    short = matcher(kind, plan, grammar, wishes)
    assert says(kind, short, f"{opening}ok</think>{text}") == f"{opening}ok</think>{text}"


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_budget_of_nothing_means_no_thoughts(kind: str):
    none = Wishes(budget=0)
    assert says(kind, matcher(kind, ReplyPlan(THINKS, "inside"), None, none), "a") == ""
    assert says(kind, matcher(kind, ReplyPlan(THINKS, "inside"), None, none), "</think>Yes") == "</think>Yes"
    assert says(kind, matcher(kind, ReplyPlan(THINKS, "outside"), None, none), "<think>a") in ("", "<think")
    assert says(kind, matcher(kind, ReplyPlan(THINKS, "outside"), None, none), "Yes <b>") == "Yes <b>"


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_in_harmony_the_shape_is_the_final_messages(kind: str):
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"
    plan = ReplyPlan(HARMONY, "outside")
    for text in (f"{analysis}{final}yes", f"{final}no"):
        made = matcher(kind, plan, YES)
        assert says(kind, made, text) == text
        assert may_end(made)
    assert says(kind, matcher(kind, plan, YES), f"{final}maybe") == final
    if kind == "letters":
        with pytest.raises(InvalidRequest, match="is not one token"):
            matcher(kind, plan, None, Wishes(budget=2))
        return
    bounded = matcher(kind, plan, None, Wishes(budget=2))
    assert says(kind, bounded, analysis) == "<|channel|>analysis<|message|>Hm"
    assert says(kind, bounded, f"<|end|><|start|>assistant{final}Yes.").endswith("Yes.")


def test_marks_of_the_vocabulary_are_no_text():
    assert BOS not in bits(matcher("special", ReplyPlan(THINKS, "inside"), YES))
