"""Guidance by a negative prompt: the logits by a plain twin, and a hidden sequence that keeps up with its own."""

import math
import random

import httpx
import numpy as np
import pytest
import torch
from engine_runs import make_core, request, run, text_of
from error_bounds import UNIT
from fake_api import events
from fakes import BOS, FakeBackend, letters
from hypothesis import given
from hypothesis import strategies as st
from test_engine_core import expected

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.guidance import guided
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import GenerateRequest, Guidance

AWAY, TOWARDS = 0.0, 2.0  # scales at which the negative prompt alone decides, and the prompt alone in a model of rules


def ask(name: str, prompt: str, negative: str, scale: float, *, n: int = 1, **fields: object) -> GenerateRequest:
    plain = request(name, prompt, n=n, **fields)  # type: ignore[arg-type]
    return GenerateRequest(
        name, plain.prompt, plain.sampling, plain.stop, n=n, guidance=Guidance(negative, scale), namespace="n"
    )


@given(st.integers(1, 40), st.floats(0, 10), st.integers(0, 2**32 - 1))
def test_the_difference_of_the_log_probabilities_counts_so_many_times(size: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompted, negative = rng.normal(0, 5, (2, size)).astype(np.float32)
    p, n = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (prompted, negative))
    found = guided(torch.from_numpy(prompted), torch.from_numpy(negative), scale)
    # a log probability is a logit less the sum's logarithm, both of up to `most`: some roundings of float32 each
    most = max(np.abs(prompted).max(), np.abs(negative).max()) + np.log(size)
    off = (8 * most + math.sqrt(size)) * UNIT
    exact = n + scale * (p - n)
    assert (
        np.abs(found.numpy() - exact) <= (1 + 2 * scale) * off + 4 * UNIT * (np.abs(n) + scale * np.abs(p - n))
    ).all()


def test_a_token_that_either_prompt_rules_out_is_left_to_the_prompt() -> None:
    ruled_out = float("-inf")
    prompted, negative = torch.tensor([0.0, ruled_out, 0.0]), torch.tensor([0.0, 0.0, ruled_out])
    found = guided(prompted, negative, 3.0)
    assert found[1] == ruled_out
    assert found[2] == prompted.log_softmax(-1)[2]


@pytest.mark.parametrize(("scale", "decides"), [(AWAY, "negative"), (TOWARDS, "prompt")])
@pytest.mark.parametrize("step_tokens", [8, 64])
def test_both_prompts_are_read_and_both_follow_what_is_written(scale: float, decides: str, step_tokens: int) -> None:
    texts = {"prompt": "a prompt of some length", "negative": "x" * 40}
    for prompt, negative in ((texts["prompt"], texts["negative"]), (texts["negative"], texts["prompt"])):
        core = make_core(FakeBackend(max_step_tokens=step_tokens))
        deltas = run(core, ask("r", prompt, negative, scale))["r"]
        assert text_of(deltas) == expected(negative if decides == "negative" else prompt, 20)
        assert deltas[-1].finish is not None
        assert deltas[-1].finish.num_tokens == 20
        assert core.stats().cache_used == 0


def test_a_scale_of_one_costs_nothing() -> None:
    backend = FakeBackend()
    run(make_core(backend), ask("r", "hello", "bye", 1.0))
    assert all(len(step) == 1 for step in backend.steps)


def test_no_text_is_a_bos_alone() -> None:
    deltas = run(make_core(FakeBackend()), ask("r", "hello", "", AWAY))["r"]
    assert text_of(deltas) == expected("", 20)


def test_choices_share_both_prompts_and_the_next_request_finds_them() -> None:
    backend = FakeBackend()
    core = make_core(backend)
    for prefilled in (41 + 31, 2):
        backend.steps.clear()
        deltas = run(core, ask("r", "p" * 40, "q" * 30, AWAY, n=3))["r"]
        assert [text_of(deltas, i) for i in range(3)] == [expected("q" * 30, 20)] * 3
        num_run = sum(len(chunk.token_ids) for step in backend.steps for chunk in step)
        assert num_run == prefilled + 2 * (3 * 19) + 2 * 2, "and the last token of each prompt once for each choice"


def test_a_banned_string_is_taken_back_from_both() -> None:
    prompt = [BOS, *b"q" * 30]
    banned = expected("q" * 30, 6)[2:6]
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + 20:  # all other ways on tie, and the lowest id is taken
        token_ids.append(0 if len(token_ids) == len(prompt) + 2 else letters(token_ids))
    core = make_core(FakeBackend())
    sampling = SamplingParams(temperature=0.0, banned_strings=(banned,))
    deltas = run(core, ask("r", "p" * 40, "q" * 30, AWAY, sampling=sampling))["r"]
    assert text_of(deltas) == bytes(token_ids[len(prompt) :]).decode()
    assert core.stats().cache_used == 0


def test_random_traffic_with_and_without_guides_is_answered_exactly() -> None:
    rng = random.Random(11)
    preemptions = 0
    for _ in range(20):
        backend = FakeBackend(capacity=rng.randint(290, 320), max_model_len=128, max_num_seqs=rng.randint(2, 6))
        core = make_core(backend)
        todo = {
            f"r{i}": (
                rng.choice("abcdef") * rng.randint(1, 60),
                rng.choice(["", rng.choice("xyz") * rng.randint(1, 60)]),
            )
            for i in range(12)
        }
        texts = dict.fromkeys(todo, "")
        finished: set[str] = set()
        cancelled = {name for name in todo if rng.random() < 0.2}
        queue = list(todo)
        num = rng.randint(1, 60)
        while queue or core.has_work:
            if queue and rng.random() < 0.4:
                name = queue.pop()
                prompt, negative = todo[name]
                asked = request(name, prompt, max_tokens=num)
                core.add(core.prepare(ask(name, prompt, negative, AWAY, max_tokens=num) if negative else asked))
            if cancelled and rng.random() < 0.1:
                core.cancel(rng.choice(sorted(cancelled)))
            if core.has_work:
                result = core.step()
                assert not result.failed
                for delta in result.deltas:
                    texts[delta.request_id] += delta.text
                    if delta.finish is not None:
                        finished.add(delta.request_id)
        for name, (prompt, negative) in todo.items():
            assert name in finished or name in cancelled
            whole = expected(negative or prompt, num)
            assert texts[name] == whole if name in finished else whole.startswith(texts[name])
        assert core.stats().cache_used == 0
        assert not backend.kv.live
        preemptions += core.stats().preemptions
    assert preemptions > 0


@pytest.mark.parametrize(
    ("backend", "negative"),
    [
        (FakeBackend(max_num_seqs=1), "x"),
        (FakeBackend(max_model_len=128), "x" * 127),
        (FakeBackend(capacity=96, max_model_len=128), "x" * 74),
    ],
    ids=["one place", "window", "cache"],
)
def test_a_guide_that_can_not_run_is_refused_by_name(backend: FakeBackend, negative: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_core(backend).prepare(ask("r", "a" * 20, negative, TOWARDS))
    assert caught.value.param == "negative_prompt"


@pytest.mark.parametrize("max_tokens", [29, 10**9, None])
def test_an_answer_without_a_limit_or_with_one_above_the_guides_room_ends_with_that(max_tokens: int | None) -> None:
    core = make_core(FakeBackend(max_model_len=128))
    deltas = run(core, ask("r", "a", "b" * 99, AWAY, max_tokens=max_tokens))["r"]
    assert deltas[-1].finish is not None
    assert (deltas[-1].finish.reason, deltas[-1].finish.num_tokens) == ("length", 128 - 100)


@pytest.mark.parametrize(("grain", "room"), [(1, 43), (16, 28)])
def test_beside_its_guide_an_answer_has_half_of_the_cells_that_are_surely_left(grain: int, room: int) -> None:
    backend = FakeBackend(capacity=128, max_model_len=128)
    backend.kv.grain = grain
    deltas = run(make_core(backend), ask("r", "a", "b" * 39, AWAY, max_tokens=None))["r"]  # 42 tokens with their BOS
    assert deltas[-1].finish is not None
    assert (deltas[-1].finish.reason, deltas[-1].finish.num_tokens) == ("length", room)


@pytest.mark.parametrize("runner", ["server_url", "torch_server_url"])
def test_a_real_model_is_led_by_as_much_as_it_was_asked_to(runner: str, request: pytest.FixtureRequest) -> None:
    url = f"{request.getfixturevalue(runner)}/v1/completions"
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 20}
    prompt, negative = "Once upon a time", "In the year"  # which lead to other words: by more than 1 in the logits

    def likeliest(**fields: object) -> dict[str, float]:
        answer = httpx.post(url, json={**asked, **fields}, timeout=60).json()
        top: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return top

    p, n = likeliest(prompt=prompt), likeliest(prompt=negative)
    found = likeliest(prompt=prompt, negative_prompt=negative, guidance_scale=1.5)
    first, *others = sorted(p.keys() & n.keys() & found.keys(), key=p.__getitem__, reverse=True)
    assert others
    led = {token: n[token] + 1.5 * (p[token] - n[token]) for token in (first, *others)}
    assert all(abs((led[token] - led[first]) - (p[token] - p[first])) > 1 for token in others)
    for token in others:  # up to rounding, and one number for all of them, which makes the probabilities add up to one
        assert found[token] - found[first] == pytest.approx(led[token] - led[first], abs=0.2)


@pytest.mark.parametrize("runner", ["server_url", "torch_server_url"])
def test_a_guided_answer_is_the_same_whole_streamed_and_beside_others(
    runner: str, request: pytest.FixtureRequest
) -> None:
    url = f"{request.getfixturevalue(runner)}/v1/completions"
    asked = {"prompt": "1, 2, 3, 4, 5, 6, 7,", "negative_prompt": "One, two,", "guidance_scale": 1.2, "max_tokens": 8}
    asked |= {"temperature": 0}
    whole = httpx.post(url, json=asked | {"n": 2}, timeout=60).json()["choices"]
    assert {choice["text"] for choice in whole} == {" 8, 9, 1"}
    reply = httpx.post(url, json=asked | {"stream": True}, timeout=60)
    assert "".join(e["choices"][0]["text"] for e in events(reply.text) if e != "[DONE]") == " 8, 9, 1"
