"""The loop, over a model made of rules: every request gets the text it would get alone, whatever else is going on."""

import random
from collections.abc import Sequence

import pytest
from engine_runs import make_core, request, run, text_of, text_prompt
from fakes import BOS, END_OF_TURN, EOS, ByteTokenizer, FakeBackend, letters, script
from msgspec.structs import replace

from tightrope.engine.core import EngineCore
from tightrope.engine.errors import BackendFailed, ContextLengthExceeded, InvalidRequest
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Delta, LogprobRequest, Prompt, Span, TextPrompt, TokenPrompt
from tightrope.engine.writer import UNTIMED, Writer
from tightrope.kernels import dispatch
from tightrope.kernels.forms.compiling import Compiling

pytestmark = pytest.mark.quick


def expected(prompt: str, num_tokens: int) -> str:
    token_ids = [BOS, *prompt.encode()]
    for _ in range(num_tokens):
        token_ids.append(letters(token_ids))
    return bytes(token_ids[-num_tokens:]).decode()


def test_a_long_prompt_is_computed_in_chunks_and_answered_as_if_in_one():
    backend = FakeBackend(max_step_tokens=16)
    deltas = run(make_core(backend), request(prompt="x" * 100))["r"]
    assert text_of(deltas) == expected("x" * 100, 20)
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.reason == "length"
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_tokens == 101
    assert len(backend.steps) == 7 + 19


def test_streams_keep_their_rate_while_a_long_prompt_is_computed():
    backend = FakeBackend(max_step_tokens=32)
    core = make_core(backend)
    core.add(core.prepare(request("short", "hi", max_tokens=60)))
    core.step()
    core.add(core.prepare(request("long", "x" * 300, max_tokens=2)))
    gap = longest = 0
    while core.has_work:
        wrote = any(delta.request_id == "short" for delta in core.step().deltas)
        gap = 0 if wrote else gap + 1
        longest = max(longest, gap if any(s.request.request_id == "short" for s in core._scheduler.running) else 0)
    assert longest == 0  # a token every step


def test_the_time_of_a_compile_is_not_learned_as_that_of_a_prompt(monkeypatch: pytest.MonkeyPatch):
    now_s = 0.0
    compiling = Compiling(lambda: now_s)
    monkeypatch.setattr(dispatch, "compiling", compiling)

    def compiles(token_ids: Sequence[int]) -> int:
        nonlocal now_s
        compiling.begin()
        now_s += 300.0
        compiling.end()
        now_s += 0.5
        return ord("a")

    core = EngineCore(FakeBackend(compiles), LimitSettings(), clock=lambda: now_s)
    run(core, request(prompt="x" * 63, max_tokens=1))

    assert core._scheduler._rate.seconds_of(64) == pytest.approx(0.5)


def test_the_next_turn_of_a_chat_computes_only_what_is_new():
    backend = FakeBackend()
    core = make_core(backend)
    first = text_of(run(core, request("one", "a" * 200, max_tokens=10))["one"])
    backend.steps.clear()
    deltas = run(core, request("two", "a" * 200 + first + "more", max_tokens=1))["two"]
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_cached == 1 + 200 + 9  # BOS, prompt, and all of the answer that has run
    assert sum(len(chunk.token_ids) for step in backend.steps for chunk in step) == 5
    assert text_of(deltas) == expected("a" * 200 + first + "more", 1)


def test_requests_of_different_namespaces_share_nothing():
    core = make_core(FakeBackend())
    run(core, request("one", "a" * 50))
    info = run(core, request("two", "a" * 50, namespace="adapter"))["two"][0].prompt
    assert info is not None
    assert info.num_cached == 0


def test_the_choices_of_one_request_share_the_computation_of_their_prompt():
    backend = FakeBackend()
    deltas = run(make_core(backend), request(prompt="p" * 40, n=3))["r"]
    assert [text_of(deltas, i) for i in range(3)] == [expected("p" * 40, 20)] * 3
    prefilled = sum(len(c.token_ids) for step in backend.steps for c in step if len(c.token_ids) > 1)
    assert prefilled == 41


def test_preempted_sequences_write_the_same_text_as_alone():
    backend = FakeBackend(capacity=150, max_model_len=120)
    core = make_core(backend)
    prompts = {f"r{i}": f"prompt number {i} " * 3 for i in range(4)}
    deltas = run(core, *(request(name, prompt, max_tokens=60) for name, prompt in prompts.items()))
    assert core.stats().preemptions > 0
    assert {name: text_of(d) for name, d in deltas.items()} == {n: expected(p, 60) for n, p in prompts.items()}


def test_random_traffic_is_answered_exactly_and_leaves_an_empty_cache():
    rng = random.Random(7)
    for _ in range(20):
        backend = FakeBackend(capacity=rng.randint(130, 400), max_model_len=128, max_num_seqs=rng.randint(1, 6))
        core = make_core(backend)
        todo = [
            (f"r{i}", rng.choice("ab") * rng.randint(1, 60) + rng.choice("xy"), rng.randint(1, 60)) for i in range(12)
        ]
        cancelled = {name for name, _, _ in todo if rng.random() < 0.2}
        texts: dict[str, str] = {name: "" for name, _, _ in todo}
        finished: set[str] = set()
        queue = list(todo)
        while queue or core.has_work:
            if queue and rng.random() < 0.4:
                name, prompt, num = queue.pop()
                core.add(core.prepare(request(name, prompt, max_tokens=num)))
            if cancelled and rng.random() < 0.1:
                core.cancel(rng.choice(sorted(cancelled)))
            if core.has_work:
                for delta in core.step().deltas:
                    texts[delta.request_id] += delta.text
                    if delta.finish is not None:
                        finished.add(delta.request_id)
        for name, prompt, num in todo:
            assert name in finished or name in cancelled
            whole = expected(prompt, num)
            assert texts[name] == whole if name in finished else whole.startswith(texts[name])
        assert core.stats().cache_used == 0
        assert not backend.kv.live


def test_a_cancelled_request_ends_before_the_next_step():
    backend = FakeBackend()
    core = make_core(backend)
    core.add(core.prepare(request("gone", max_tokens=500)))
    core.step()
    core.cancel("gone")
    assert not core.has_work
    assert core.stats().cancelled == 1
    assert core.stats().cache_used == 0


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ({}, "Hi there", "eos"),
        ({"strings": (" th",)}, "Hi", "stop_string"),
        ({"strings": (" th",), "keep_stop_text": True}, "Hi th", "stop_string"),
        ({"strings": ("H",), "min_tokens": 3}, "Hi there", "eos"),
        ({"max_tokens": 2}, "Hi", "length"),
        ({"max_tokens": 9}, "Hi there", "eos"),
        ({"max_tokens": 9, "length_first": True}, "Hi there", "length"),
        ({"token_ids": (ord("t"),)}, "Hi ", "stop_token"),
    ],
)
def test_a_sequence_ends_by_the_rule_that_comes_first(stop: dict[str, object], text: str, reason: str):
    deltas = run(make_core(FakeBackend(script("Hi there"))), request(**stop))["r"]
    assert text_of(deltas) == text
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.reason == reason


def test_an_answer_is_written_again_from_the_tokens_that_were_given_out():
    asked = request(logprobs=LogprobRequest(top=2, processed=False), strings=("re",), max_tokens=30)
    deltas = run(make_core(FakeBackend(script("Hi there"))), asked)["r"]

    writer = Writer(asked, 0, ByteTokenizer(), 30)
    tokens = [token for delta in deltas for token in delta.tokens]
    tops = [[(one.token_id, one.logprob) for one in token.top] for token in tokens]
    again: list[Delta] = []
    for token, likeliest in zip(tokens, tops, strict=True):
        again += writer.take(token.token_id, token.logprob, likeliest)

    assert deltas[-1].finish is not None
    ended = replace(deltas[-1].finish, timings=UNTIMED)
    assert again == [*(replace(d, prompt=None, carry=None) for d in deltas[:-1]), replace(deltas[-1], finish=ended)]


def test_the_end_token_is_counted_and_listed_but_adds_no_text():
    deltas = run(make_core(FakeBackend(script("Hi", end=END_OF_TURN))), request())["r"]
    last = deltas[-1]
    assert last.finish is not None
    assert last.finish.num_tokens == 3
    assert [(t.token_id, t.raw, t.text, t.is_special) for t in last.tokens] == [(END_OF_TURN, b"<|im_end|>", "", True)]


def test_ignored_end_tokens_are_never_drawn():
    deltas = run(make_core(FakeBackend(script("Hi"))), request(ignore_eos=True, max_tokens=12))["r"]
    tokens = [token.token_id for delta in deltas for token in delta.tokens]
    assert len(tokens) == 12
    assert not {EOS, END_OF_TURN} & set(tokens)


def test_torn_characters_are_joined_across_tokens():
    answer = "줄타기 🎪 é"
    deltas = run(make_core(FakeBackend(script(answer))), request(max_tokens=60))["r"]
    assert text_of(deltas) == answer
    assert not any("\ufffd" in delta.text for delta in deltas)


def test_bos_stands_in_front_once():
    core = make_core(FakeBackend())
    assert [t.token_id for t in core.tokenize(text_prompt("a"))] == [BOS, ord("a")]
    assert [t.token_id for t in core.tokenize(text_prompt("<s>a"))] == [BOS, ord("a")]
    assert [t.token_id for t in core.tokenize(TextPrompt((Span("a"),), add_bos=False))] == [ord("a")]
    assert [t.token_id for t in core.tokenize(TokenPrompt((5,)))] == [5]


def test_special_text_in_a_plain_span_stays_text():
    core = make_core(FakeBackend())
    tokens = core.tokenize(TextPrompt((Span("<s>"), Span("<s>", parse_special=False))))
    assert [t.token_id for t in tokens] == [BOS, *b"<s>"]


def test_prompts_side_by_side_get_their_logprobs_from_steps_of_few_rows():
    backend = FakeBackend(max_step_tokens=64, max_prompt_rows=8)  # which refuses a step of more
    prompts = {name: name * 30 for name in "abc"}
    wanted = [request(name, prompt, prompt_logprobs=0, max_tokens=2) for name, prompt in prompts.items()]

    found = run(make_core(backend), *wanted)

    for name, prompt in prompts.items():
        info = found[name][0].prompt
        assert info is not None
        assert info.tokens is not None
        assert [token.token_id for token in info.tokens[1:]] == list(prompt.encode())


def test_prompt_logprobs_cover_every_prompt_token_and_leave_the_answer_as_it_was():
    backend = FakeBackend(max_step_tokens=16)
    core = make_core(backend)
    run(core, request("before", "abc" * 20))
    deltas = run(core, request("r", "abc" * 20, prompt_logprobs=2))["r"]
    assert text_of(deltas) == expected("abc" * 20, 20)
    info = deltas[0].prompt
    assert info is not None
    assert info.tokens is not None
    assert [t.token_id for t in info.tokens] == [BOS, *b"abc" * 20]
    assert info.tokens[0].logprob is None
    for place, token in enumerate(info.tokens[1:], start=1):
        likeliest = letters([t.token_id for t in info.tokens[:place]])
        assert token.logprob is not None
        assert token.top[0].token_id == likeliest
        assert (token.logprob > -0.1) == (token.token_id == likeliest)


def test_no_new_tokens_means_the_prompt_alone_is_scored():
    deltas = run(make_core(FakeBackend()), request(prompt_logprobs=0, max_tokens=0))["r"]
    assert len(deltas) == 1
    assert deltas[0].tokens == ()
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.tokens is not None
    assert deltas[0].finish is not None
    assert deltas[0].finish.reason == "length"


def test_a_prompt_over_the_window_is_refused_with_both_counts():
    core = make_core(FakeBackend(max_model_len=64))
    with pytest.raises(ContextLengthExceeded) as caught:
        core.prepare(request(prompt="x" * 64, max_tokens=10))
    assert caught.value.details() == {"prompt_tokens": 65, "new_tokens": 1, "max_model_len": 64}


def test_a_prompt_that_leaves_too_little_of_what_is_reserved_is_refused_with_both_counts():
    core = make_core(FakeBackend(max_model_len=64))
    with pytest.raises(ContextLengthExceeded) as caught:
        core.prepare(request(prompt="x" * 60, max_tokens=10, reserve_tokens=10))
    assert caught.value.details() == {"prompt_tokens": 61, "new_tokens": 10, "max_model_len": 64}


def test_a_prompt_over_the_bound_of_prompts_is_refused_though_the_window_has_room():
    core = make_core(FakeBackend(max_model_len=64), max_input_tokens=10)
    assert core.prepare(request(prompt="x" * 9, max_tokens=10))[0].max_len == 20  # BOS is counted
    with pytest.raises(ContextLengthExceeded, match=r"prompts of up to 10 tokens\. However, yours has 11") as caught:
        core.prepare(request(prompt="x" * 10, max_tokens=1))
    again = ContextLengthExceeded.rebuild(caught.value.message, "prompt", caught.value.details())
    assert (again.message, again.max_input_tokens) == (caught.value.message, 10)


@pytest.mark.parametrize("max_tokens", [1, 10, None])
def test_a_prompt_of_exactly_the_window_gets_its_one_token(max_tokens: int | None):
    backend = FakeBackend(max_model_len=64, capacity=64)
    deltas = run(make_core(backend), request(prompt="x" * 63, max_tokens=max_tokens))["r"]
    assert text_of(deltas) == expected("x" * 63, 1)


@pytest.mark.parametrize("max_tokens", [14, 10**9, None])
def test_without_a_limit_or_with_one_above_the_room_the_answer_ends_with_the_window(max_tokens: int | None):
    core = make_core(FakeBackend(max_model_len=64, capacity=64))
    deltas = run(core, request(prompt="x" * 50, max_tokens=max_tokens))["r"]
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.reason == "length"
    assert deltas[-1].finish.num_tokens == 64 - 51


@pytest.mark.parametrize(
    ("prompt", "says"),
    [(TokenPrompt(()), "empty"), (TokenPrompt((1, 999)), "999"), (TokenPrompt((-1,)), "-1")],
)
def test_prompts_that_cannot_run_are_refused(prompt: Prompt, says: str):
    with pytest.raises(InvalidRequest, match=says):
        make_core(FakeBackend()).prepare(request(prompt=prompt))


def test_truncation_keeps_the_last_tokens():
    deltas = run(make_core(FakeBackend()), request(prompt="abcdef", truncate_to=3))["r"]
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_tokens == 3


def test_a_model_that_fails_ends_the_requests_of_that_step_and_serves_the_next():
    backend = FakeBackend()
    core = make_core(backend)
    core.add(core.prepare(request("bad")))
    backend.broken = "the device is on fire"
    result = core.step()
    assert [(name, type(error)) for name, error in result.failed] == [("bad", BackendFailed)]
    backend.broken = None
    assert text_of(run(core, request("good"))["good"]) == expected("hello?", 20)


def test_when_nothing_can_be_drawn_that_sequence_alone_ends_with_an_error():
    everything = {i: float("-inf") for i in range(259)}
    core = make_core(FakeBackend())
    deltas = run(core, request("none", sampling=SamplingParams(logit_bias=everything)), request("good"))
    assert deltas["none"][-1].finish is not None
    assert deltas["none"][-1].finish.reason == "error"
    assert text_of(deltas["good"]) == expected("hello?", 20)


def test_the_same_seed_gives_the_same_text_and_choices_differ():
    sampling = SamplingParams(temperature=30.0, seed=5)
    core = make_core(FakeBackend())
    first = run(core, request(n=2, sampling=sampling))["r"]
    again = run(core, request(n=2, sampling=sampling))["r"]
    tokens = [[t.token_id for d in first if d.index == i for t in d.tokens] for i in range(2)]
    assert tokens == [[t.token_id for d in again if d.index == i for t in d.tokens] for i in range(2)]
    assert tokens[0] != tokens[1]


def test_the_last_token_of_a_seeded_prompt_runs_by_itself_as_it_does_when_the_rest_is_cached():
    backend = FakeBackend()
    core = make_core(backend)
    run(core, request("first", "p" * 40, sampling=SamplingParams(seed=1)))
    lengths = [[len(chunk.token_ids) for chunk in step] for step in backend.steps]
    deltas = run(core, request("again", "p" * 40, sampling=SamplingParams(seed=1)))["again"]
    assert sum(lengths[0]) + 1 == 41  # BOS and 40 bytes
    assert lengths[1] == [1]
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_cached == 40
