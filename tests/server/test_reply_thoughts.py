"""Thoughts in what a model writes: told by its template's marks, and the same however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replies import events_of, joined, read

from tightrope.server.replies.events import Content, Thought
from tightrope.server.replies.form import ReplyPlan, reply_form
from tightrope.server.replies.planning import Wishes, thinking_variables
from tightrope.server.replies.thoughts import MARKS, place_in, thought_marks

pytestmark = pytest.mark.quick

THINKS = "{% if '</think>' in content %}{{ content.split('</think>')[-1] }}{% endif %}<think>"
HARMONY = "<|start|>assistant<|channel|>analysis<|message|>"
PLANS = {
    "outside": ReplyPlan(reply_form(THINKS), "outside"),
    "inside": ReplyPlan(reply_form(THINKS), "inside"),
    "behind": ReplyPlan(reply_form(THINKS), "behind"),
    "going on": ReplyPlan(reply_form(THINKS), "inside", goes_on=True),
    "brackets": ReplyPlan(reply_form("[THINK][/THINK]"), "outside"),
    "gemma": ReplyPlan(reply_form(r"{{ '<|channel>thought\n' + t + '<channel|>' }}"), "outside"),
    "harmony": ReplyPlan(reply_form(HARMONY), "outside"),
    "harmony with tools": ReplyPlan(reply_form(HARMONY), "outside", functions={"add": {}}),
}
PREAMBLE = "<|channel|>commentary<|message|>First this.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>Hm, 1 < 2.<|end|><|start|>assistant"
CASES = [
    ("outside", "<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", "Hm.\n\nSo.", "Yes.\n"),
    ("outside", "\n<think>a</think><think>b</think>c", "ab", "c"),
    ("outside", " Yes <think>no</think>", "", " Yes <think>no</think>"),
    ("outside", "<think>never ends", "never ends", ""),
    ("outside", "<thi", "", "<thi"),
    ("inside", "\nHm </thin </think>\n\nYes.", "Hm </thin", "Yes."),
    ("inside", "</think>Yes.", "", "Yes."),
    ("behind", "\n\nYes.", "", "Yes."),
    ("behind", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
    ("going on", " and so</think> Yes.", " and so", "Yes."),
    ("brackets", "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
    ("gemma", "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
    ("harmony", f"{ANALYSIS}{FINAL}Yes.", "Hm, 1 < 2.", "Yes."),
    ("harmony", f"{ANALYSIS}{FINAL}Yes.<|return|>", "Hm, 1 < 2.", "Yes."),
    ("harmony", f"{PREAMBLE}{FINAL}Yes.", "", "First this.Yes."),
    ("harmony", "Yes.", "", "Yes."),
    ("harmony", "<|channel|>fin", "", ""),
    ("harmony with tools", "<|channel|>commentary to=browser.search<|message|>{}<|call|>", "{}", ""),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "text", "thought", "content"), CASES)
def test_thoughts_are_told_from_words(plan: str, text: str, thought: str, content: str):
    assert read(PLANS[plan], text) == (thought, content, [])


@pytest.mark.parametrize(("plan", "text", "thought", "content"), CASES)
def test_a_cut_answer_shows_no_piece_of_a_mark(plan: str, text: str, thought: str, content: str):
    for end in range(len(text)):
        some_thought, some_content, _ = read(PLANS[plan], text[:end], is_cut=True)
        assert thought.startswith(some_thought)
        assert content.startswith(some_content)


pieces = st.sampled_from(
    [*(mark for marks in MARKS[:3] for mark in marks.tokens), FINAL, ANALYSIS, "a", " ", "\n", "<", "<|"]
)


@given(st.lists(pieces, max_size=8).map("".join), st.sampled_from(sorted(PLANS)), st.booleans())
def test_cuts_change_nothing(text: str, plan: str, is_cut: bool):
    read(PLANS[plan], text, is_cut=is_cut)


def test_thoughts_and_words_come_while_they_are_written():
    reader = PLANS["outside"].reader()
    assert reader is not None
    assert reader.feed("<think>\nH") == [Thought("H")]
    assert reader.feed("m. ") == [Thought("m.")]
    assert reader.feed("So</") == [Thought(" So")]
    assert reader.feed("think>\n\nYes") == [Content("Yes")]
    assert reader.feed(", it") == [Content(", it")]


def test_what_becomes_of_thoughts_is_the_clients_to_say():
    text, form = "<think>Hm.</think>Yes.", reply_form(THINKS)
    assert read(ReplyPlan(form, "outside", "dropped"), text) == ("", "Yes.", [])
    assert ReplyPlan(form, "outside", "in the text").reader() is None
    raw = ReplyPlan(reply_form(HARMONY), "outside", "in the text", functions={"add": {}})
    assert joined(events_of(raw, [ANALYSIS + FINAL + "Yes."])) == ("", "Hm, 1 < 2.Yes.", [])


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.closing)
def test_the_template_tells_the_marks(marks: object):
    assert thought_marks(f"... {marks.opening} ... {marks.closing}") == marks  # type: ignore[attr-defined]


def test_a_template_without_marks_has_no_thoughts():
    assert thought_marks("{{ messages }} We think, <thinking> aloud.") is None
    assert ReplyPlan(reply_form("{{ messages }}"), "outside").reader() is None


def test_a_template_may_name_one_mark_alone():
    assert thought_marks("{{ content.split('</think>')[-1] }}") == MARKS[0], "the history is cut behind thoughts"
    assert thought_marks("{{ content }}<|assistant|>[THINK]") == MARKS[1], "thoughts are begun, and stay in the history"
    assert thought_marks("<think>{{ content.split('[/THINK]')[-1] }}[THINK]") == MARKS[1], "a pair goes before a part"


@pytest.mark.parametrize(
    ("prompt", "continued", "place"),
    [
        ("<|assistant|>", None, "outside"),
        ("<|assistant|><think>\n", None, "inside"),
        ("<|assistant|><think>\n\n</think>\n\n", None, "behind"),
        ("What does <think> mean?<|assistant|>", None, "outside"),
        ("<|assistant|><think>\nHm", "<think>\nHm", "inside"),
        ("<|assistant|>Yes, and", "Yes, and", "outside"),
        ("<|assistant|><think>Hm</think>Yes", "<think>Hm</think>Yes", "behind"),
    ],
)
def test_the_prompt_tells_where_an_answer_begins(prompt: str, continued: str | None, place: str):
    assert place_in(prompt, MARKS[0], continued) == place


def test_effort_and_switch_become_the_templates_variables():
    form, harmony = reply_form(THINKS), reply_form(HARMONY)
    assert thinking_variables(form, Wishes()) == {}
    assert thinking_variables(form, Wishes(effort="high")) == {
        "reasoning_effort": "high",
        "enable_thinking": True,
        "thinking": True,
    }
    assert thinking_variables(form, Wishes(effort="none"))["enable_thinking"] is False
    assert thinking_variables(form, Wishes(effort="high", enabled=False))["enable_thinking"] is False
    assert thinking_variables(harmony, Wishes(effort="minimal"))["reasoning_effort"] == "low"
