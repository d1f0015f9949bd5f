"""A seed gives the same text again on the real model: equal to the last bit, and with the prefix cache in use."""

from collections.abc import Iterator

import pytest

from tightrope.backends.detect import open_backend
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.core import EngineCore
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Delta, GenerateRequest, LogprobRequest, Span, StopRules, TextPrompt, TokenPrompt

QUESTION = "<|im_start|>user\nWhat would you pack for a week in the hills?<|im_end|>\n<|im_start|>assistant\n"
Drawn = list[tuple[int, float | None]]


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    settings = ModelSettings(gguf_engine="llama.cpp", max_model_len=2048, cache=CacheSettings(tokens=4096))
    backend = open_backend(settings, lambda share: None)
    yield EngineCore(backend, LimitSettings())
    backend.close()


def ask_greedily(core: EngineCore, prompt: str, namespace: str, num_tokens: int = 40) -> tuple[str, Drawn, int]:
    """The same of a greedy answer, over what is cached under that name."""
    request = GenerateRequest(
        f"{namespace} {prompt}",
        TextPrompt((Span(prompt),)),
        SamplingParams(temperature=0.0),
        StopRules(max_tokens=num_tokens, ignore_eos=True),
        logprobs=LogprobRequest(False, 0),
        namespace=namespace,
    )
    return run(core, request)


def run(core: EngineCore, request: GenerateRequest) -> tuple[str, Drawn, int]:
    core.add(core.prepare(request))
    deltas: list[Delta] = []
    while not deltas or deltas[-1].finish is None:
        deltas += core.step().deltas
    assert deltas[0].prompt is not None
    drawn = [(token.token_id, token.logprob) for delta in deltas for token in delta.tokens]
    return "".join(delta.text for delta in deltas), drawn, deltas[0].prompt.num_cached


def ask(core: EngineCore, prompt: str, seed: int, num_tokens: int = 12) -> tuple[str, Drawn, int]:
    """The text, each token with its log probability, and how much of the prompt was cached."""
    request = GenerateRequest(
        f"{seed} {prompt}",
        TextPrompt((Span(prompt),)),
        SamplingParams(temperature=1.5, seed=seed),
        StopRules(max_tokens=num_tokens, ignore_eos=True),
        logprobs=LogprobRequest(False, 0),
    )
    return run(core, request)


def test_a_seed_gives_the_same_numbers_again_over_its_own_cached_prompt(core: EngineCore) -> None:
    prompt = "Wind, rain and snow. " * 8 + QUESTION
    _, first, num_cached = ask(core, prompt, seed=1)
    assert num_cached == 0
    _, again, num_cached = ask(core, prompt, seed=1)
    assert num_cached > 0
    assert again == first
    assert ask(core, prompt, seed=2)[1] != first


def test_the_next_turn_of_a_chat_is_reused_and_reproducible(core: EngineCore) -> None:
    opening = "The mountain hut. " * 60 + QUESTION
    answer, first, _ = ask(core, opening, seed=3)
    turn = f"{opening}{answer}<|im_end|>\n<|im_start|>user\nAnd for two weeks?<|im_end|>\n<|im_start|>assistant\n"
    _, second, num_cached = ask(core, turn, seed=4)
    assert num_cached > 250, "all of the first turn"
    ask(core, "Something else entirely. " * 50, seed=5)
    assert ask(core, turn, seed=4)[1] == second
    assert ask(core, opening, seed=3)[1] == first


def test_a_greedy_chat_has_the_same_numbers_with_and_without_what_is_cached(core: EngineCore) -> None:
    prompt, caches = "The mountain hut. " * 30 + QUESTION, []
    for turn in range(4):
        answer, numbers, num_cached = ask_greedily(core, prompt, "one chat")
        again = ask_greedily(core, prompt, "one chat")[1]
        cold = ask_greedily(core, prompt, f"nothing cached {turn}")
        assert numbers == again == cold[1]
        assert cold[2] == 0
        caches.append(num_cached)
        prompt += f"{answer}<|im_end|>\n<|im_start|>user\nAnd for {turn + 2} weeks?<|im_end|>\n<|im_start|>assistant\n"
    assert caches[0] == 0
    assert caches == sorted(set(caches)), "each turn finds the one before"


def test_a_greedy_answer_has_the_same_numbers_whatever_is_kept_of_other_chats(core: EngineCore) -> None:
    prompt = TokenPrompt(tuple(range(1000, 1064)))  # It always runs in one step, and fills a tile of attention.
    numbers = []
    for place in range(3):
        ask(core, f"Wind, snow, or {place} other things that stay in the cache. " * 2, seed=place, num_tokens=5 + place)
        asked = GenerateRequest(
            f"greedy {place}",
            prompt,
            SamplingParams(temperature=0.0),
            StopRules(max_tokens=5, ignore_eos=True),
            logprobs=LogprobRequest(False, 3),
            namespace=str(place),
        )
        core.add(core.prepare(asked))
        deltas = [delta for _ in range(50) if core.has_work for delta in core.step().deltas]
        numbers.append([(token.token_id, token.logprob, token.top) for delta in deltas for token in delta.tokens])
    assert numbers[0] == numbers[1] == numbers[2]
