"""Banned strings: the answer never holds one, nothing that was shown is taken back, and every answer ends."""

import itertools
from collections.abc import Sequence as Tokens

import pytest
import torch
from fakes import EOS, VOCAB_SIZE, FakeBackend, script
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.engine.core import EngineCore
from tightrope.engine.errors import InvalidRequest
from tightrope.engine.limits import MAX_BANNED_CHARS, MAX_BANNED_STRINGS
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.text.banned_strings import MAX_TRIES, BannedStrings
from tightrope.engine.types import Delta, GenerateRequest, LogprobRequest, Span, StopRules, TextPrompt

pytestmark = pytest.mark.quick

LETTERS = b"abcdAB"


class RankedBackend(FakeBackend):
    """Ranks six letters, and nothing else, by all tokens so far: so there is always another way on."""

    def _row(self, so_far: Tokens[int]) -> torch.Tensor:
        row = torch.full((VOCAB_SIZE,), -torch.inf)
        for rank, letter in enumerate(ranking(so_far)):
            row[letter] = -3.0 * rank
        return row


def ranking(so_far: Tokens[int]) -> list[int]:
    digest = 7
    for token_id in so_far:
        digest = (digest * 31 + token_id) % 1_000_003
    return sorted(LETTERS, key=lambda letter: (digest * letter) % 101)


def expected(prompt: list[int], num_tokens: int, banned: tuple[str, ...]) -> str | None:
    """The greedy text, letter by letter: back to where a banned string began, and another letter from there.

    Letters that no banned string could begin with when the text stood there are given out, and stay.
    """
    beginnings = {string[:n].lower() for string in banned for n in range(1, len(string))}
    text: list[int] = []
    excluded: dict[int, set[int]] = {}
    num_given = 0
    while len(text) < num_tokens:
        ways = [letter for letter in ranking([*prompt, *text]) if letter not in excluded.get(len(text), set())]
        if not ways:
            return None
        text.append(ways[0])
        written = bytes(text).decode().lower()
        starts = [len(written) - len(string) for string in banned if written.endswith(string.lower())]
        if starts:
            begun = max(min(starts), num_given)
            excluded = {place: ids for place, ids in excluded.items() if place <= begun}
            excluded.setdefault(begun, set()).add(text[begun])
            del text[begun:]
        else:
            possible = (i for i in range(num_given, len(written)) if written[i:] in beginnings)
            num_given = next(possible, len(written))
    return bytes(text).decode()


def request(banned: tuple[str, ...], prompt: str = "x?", **fields: object) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, banned_strings=banned)
    return GenerateRequest(
        "r",
        TextPrompt((Span(prompt),)),
        sampling,
        StopRules(**{"max_tokens": 30, **fields}),  # type: ignore[arg-type]
        logprobs=LogprobRequest(processed=False, top=1),
    )


def run(backend: FakeBackend, asked: GenerateRequest, **limits: object) -> list[Delta]:
    core = EngineCore(backend, LimitSettings(**limits))  # type: ignore[arg-type]
    core.add(core.prepare(asked))
    deltas: list[Delta] = []
    while core.has_work:
        result = core.step()
        assert not result.failed
        deltas += result.deltas
    assert not backend.kv.live
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.plain
@settings(max_examples=60)
@given(
    banned=st.lists(st.text("abcdAB", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple),
    prompt=st.text("abc", min_size=1, max_size=5),
)
def test_the_answer_is_the_one_that_going_back_letter_by_letter_finds(banned: tuple[str, ...], prompt: str):
    deltas = run(RankedBackend(), request(banned, prompt))
    text, finish = text_of(deltas), deltas[-1].finish
    tokens = [token for delta in deltas for token in delta.tokens]
    assert finish is not None
    assert not any(string.lower() in text.lower() for string in banned)
    assert "".join(token.text for token in tokens) == text
    assert len(tokens) == finish.num_tokens
    assert all(len(delta.tokens) <= 1 for delta in deltas)
    assert all(token.logprob is not None for token in tokens)
    whole = expected([256, *prompt.encode()], 30, banned)
    if whole is None:
        assert finish.reason == "error"
    else:
        assert (text, finish.reason) == (whole, "length")


def test_text_is_held_back_only_while_it_may_become_a_banned_string():
    deltas = run(FakeBackend(script("a shiny day")), request(("shivers",)))
    assert text_of(deltas) == "a shiny day"
    assert [delta.text for delta in deltas][:8] == ["a", " ", "", "", "", "s", "h", "i"]


def test_upper_case_is_banned_with_lower_case():
    text = text_of(run(FakeBackend(script("It SHIVERS.")), request(("Shivers",))))
    assert text.startswith("It ")
    assert "shivers" not in text.lower()


@pytest.mark.parametrize("length", [1, 2])
def test_a_string_that_begins_every_continuation_ends_the_answer_with_an_error(length: int):
    banned = tuple("".join(letters) for letters in itertools.product("abcd", repeat=length))
    finish = run(RankedBackend(), request(banned, max_tokens=None))[-1].finish
    assert finish is not None
    assert finish.reason == "error"
    assert finish.message is not None
    assert finish.num_tokens < length


def test_a_model_that_insists_on_what_is_banned_is_given_up_after_so_many_tries():
    banned = tuple(map(chr, range(128)))
    backend = FakeBackend(lambda so_far: ord("a"))
    finish = run(backend, request(banned, ignore_eos=True, max_tokens=None))[-1].finish
    assert finish is not None
    assert finish.reason == "error"
    assert len(backend.steps) < 2 * MAX_TRIES


def test_an_end_in_the_middle_of_a_possible_banned_string_gives_out_what_was_held():
    deltas = run(FakeBackend(script("good shiv")), request(("shivers",)))
    assert text_of(deltas) == "good shiv"
    finish = deltas[-1].finish
    assert finish is not None
    assert finish.reason == "eos"
    assert [token.token_id for delta in deltas for token in delta.tokens][-1] == EOS


def test_a_stop_string_inside_what_is_held_ends_the_answer_at_once():
    deltas = run(FakeBackend(script("one two three")), request(("two thrice",), strings=(" th",)))
    assert text_of(deltas) == "one two"
    finish = deltas[-1].finish
    assert finish is not None
    assert (finish.reason, finish.num_tokens) == ("stop_string", len("one two th"))


def test_the_first_token_of_a_prompt_of_one_token_can_be_taken_back():
    deltas = run(RankedBackend(), request(("a", "b", "c"), prompt=""))
    assert set(text_of(deltas)) == {"d"}


def test_sequences_side_by_side_go_back_without_disturbing_each_other():
    alone = [text_of(run(RankedBackend(), request(("ab", "c"), prompt))) for prompt in ("x", "y", "z")]
    core = EngineCore(RankedBackend(capacity=120, max_model_len=64), LimitSettings())
    asked = [request(("ab", "c"), prompt) for prompt in ("x", "y", "z")]
    names = ["x", "y", "z"]
    for name, one in zip(names, asked, strict=True):
        core.add(core.prepare(GenerateRequest(name, one.prompt, one.sampling, one.stop)))
    texts = dict.fromkeys(names, "")
    while core.has_work:
        for delta in core.step().deltas:
            texts[delta.request_id] += delta.text
    assert list(texts.values()) == alone


def test_a_character_torn_between_tokens_is_banned_by_what_completes_it():
    text = text_of(run(FakeBackend(script("a é b")), request(("é",))))
    assert text.startswith("a ")
    assert "é" not in text


@pytest.mark.parametrize(
    "strings", [[""], ["x" * (MAX_BANNED_CHARS + 1)], [str(i) for i in range(MAX_BANNED_STRINGS + 1)]]
)
def test_strings_that_would_cost_too_much_are_refused(strings: list[str]):
    with pytest.raises(InvalidRequest, match="banned_strings"):
        BannedStrings(strings)
