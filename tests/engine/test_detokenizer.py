"""Text comes out whole, once, and without the stop string, however the tokens cut it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.engine.text.detokenizer import Detokenizer

pytestmark = pytest.mark.quick


def shown(detokenizer: Detokenizer, pieces: list[bytes]) -> tuple[list[str], list[str]]:
    """What is shown and what each token adds, until the end or a stop."""
    shows, texts = [], []
    for raw in pieces:
        show, text = detokenizer.feed(raw)
        shows.append(show)
        texts.append(text)
        if detokenizer.stopped_by is not None:
            return shows, texts
    return [*shows, detokenizer.flush()], texts


def test_a_stop_string_split_over_two_tokens_is_cut_from_the_text():
    out = Detokenizer(stop=["\nUser:"])
    assert out.feed(b"Fine.\nUs")[0] == "Fine."  # "\nUs" may still become the stop string
    assert out.feed(b"er: more")[0] == ""
    assert out.stopped_by == "\nUser:"


def test_text_that_only_looked_like_a_stop_string_is_shown_late():
    out = Detokenizer(stop=["\nUser:"])
    assert out.feed(b"Fine.\nUs")[0] == "Fine."
    assert out.feed(b"ual")[0] == "\nUsual"


def test_a_kept_stop_string_ends_the_text_inside_its_token_and_nothing_is_held_back():
    out = Detokenizer(stop=["###"], keep_stop_text=True)
    assert out.feed(b"a#") == ("a#", "a#")
    assert out.feed(b"## and more") == ("##", "##")
    assert out.stopped_by == "###"


def test_a_torn_character_is_shown_when_it_is_complete():
    out = Detokenizer()
    emoji = "🎪".encode()
    assert [out.feed(bytes([byte]))[0] for byte in emoji] == ["", "", "", "🎪"]


def test_a_character_that_stays_torn_at_the_end_is_left_out():
    out = Detokenizer()
    assert out.feed(b"ab" + "é".encode()[:1])[0] == "ab"
    assert out.flush() == ""


def test_bytes_that_are_no_character_become_replacements():
    out = Detokenizer()
    assert out.feed(b"a\xffb")[0] == "a\ufffdb"


def test_of_two_stop_strings_the_one_complete_first_wins_and_of_two_at_one_place_the_longer():
    out = Detokenizer(stop=["bc", "abcd", "c"])
    assert out.feed(b"xabcd")[0] == "xa"
    assert out.stopped_by == "bc"


def test_a_stop_string_is_plain_text_while_nobody_watches():
    out = Detokenizer(stop=["stop"])
    assert out.feed(b"stop", watch=False)[0] == "stop"
    assert out.feed(b" and stop")[0] == " and "
    assert out.stopped_by == "stop"


@pytest.mark.parametrize("keep", [False, True])
@given(
    text=st.text(alphabet="ab🎪é\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab🎪\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=10),
)
def test_the_text_does_not_depend_on_how_tokens_cut_it(keep: bool, text: str, stops: list[str], cuts: list[int]):
    raw = text.encode()
    pieces, at, turn = [], 0, 0
    while at < len(raw):
        step = cuts[turn % len(cuts)]
        pieces.append(raw[at : at + step])
        at, turn = at + step, turn + 1

    whole, pieced = Detokenizer(stops, keep_stop_text=keep), Detokenizer(stops, keep_stop_text=keep)
    expected = shown(whole, [raw])[0]
    got, texts = shown(pieced, pieces)
    assert "".join(got) == "".join(expected)
    assert pieced.stopped_by == whole.stopped_by
    if keep:
        assert "".join(texts) == "".join(got)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends and keep:
        assert "".join(got) == text[: min(ends)]
    if not ends:
        assert "".join(got) == text
