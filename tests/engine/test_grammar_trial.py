"""Grammars that would take minutes or gigabytes to compile: refused in bounded time, and nobody else waits for them."""

import json
import threading

import pytest
from fakes import ByteTokenizer

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.grammar import Grammars
from tightrope.engine.guided.grammar_text import without_special
from tightrope.engine.guided.grammar_trial import GrammarTrial
from tightrope.engine.types import Grammar

ENDLESS = Grammar("json_schema", json.dumps({"type": "integer", "multipleOf": 99_999_989}), "response_format")
PLAIN = Grammar("regex", "yes|no", "guided_regex")


@pytest.mark.parametrize(
    "endless",
    [
        ENDLESS,
        Grammar(
            "json_schema",
            json.dumps({"allOf": [{"type": "integer", "multipleOf": divisor} for divisor in (9973, 9967)]}),
            "format",
        ),
        Grammar("regex", "(a|b)*" * 20_000, "regex"),
    ],
    ids=["multiple", "common multiple", "long pattern"],
)
def test_a_grammar_that_takes_too_long_to_compile_is_refused_and_the_next_is_not(endless: Grammar):
    grammars = Grammars(ByteTokenizer(), GrammarTrial(cpu_s=1))

    with pytest.raises(InvalidRequest, match="too long") as refusal:
        grammars.matcher(endless)

    assert refusal.value.param == endless.field
    assert not grammars.matcher(PLAIN).is_complete


def test_a_grammar_that_is_known_is_to_be_had_while_another_is_tried():
    grammars = Grammars(ByteTokenizer(), GrammarTrial(cpu_s=2))
    grammars.matcher(PLAIN)

    def ask() -> None:
        with pytest.raises(InvalidRequest):
            grammars.matcher(ENDLESS)

    asking = threading.Thread(target=ask)
    asking.start()
    grammars.matcher(PLAIN)

    assert asking.is_alive()
    assert (grammars.knows(PLAIN), grammars.knows(ENDLESS)) == (True, False)
    asking.join()


def test_the_words_of_the_library_about_a_wrong_grammar_are_still_told():
    grammars = Grammars(ByteTokenizer(), GrammarTrial())

    with pytest.raises(InvalidRequest, match="expecting"):
        grammars.matcher(Grammar("grammar", "start: )", "grammar"))


def test_a_special_token_is_tried_as_a_text_and_texts_stay():
    lark = 'start: <|im_end|> "<|im_end|>" /<a>/ <[3-7]>\n'

    assert without_special(lark) == 'start: "s" "<|im_end|>" /<a>/ "s"\n'
