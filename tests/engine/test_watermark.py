"""TGI's watermark: which tokens it makes likelier, where it stands among the steps, and that it can be found."""

import numpy as np
import pytest
import sampling_reference as reference
import torch

from tightrope.engine.sampler.sampler import sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.sampler.watermark import green_ids

pytestmark = pytest.mark.quick

VOCAB = 500
MARKED = {"watermark_delta": 2.0, "watermark_gamma": 0.5}


def state(prompt: list[int], **params: object) -> SamplerState:
    return SamplerState(SamplingParams(**params), prompt, VOCAB, None)


def drawn(logits: torch.Tensor, *states: SamplerState) -> list[int]:
    return [one.token_id for one in sample(logits, states) if one is not None]


@pytest.mark.parametrize("previous", [0, 1, 7, 151_935])
@pytest.mark.parametrize(("size", "gamma"), [(10, 0.5), (VOCAB, 0.25), (49_152, 0.5)])
def test_the_likelier_half_is_that_of_the_published_rule(previous: int, size: int, gamma: float):
    assert green_ids(previous, size, gamma).tolist() == reference.green(previous, size, gamma)


def test_rows_are_marked_by_their_own_last_tokens_before_their_penalties():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, VOCAB)).astype(np.float32)
    prompts = [[3, 9], [3, 9, 4], [9]]
    params = [
        {"temperature": 0.0, "repetition_penalty": 3.0, "logit_bias": {5: 1.5}, **MARKED},
        {"temperature": 0.0, **MARKED},
        {"temperature": 0.0},
    ]
    states = [state(prompt, **given) for prompt, given in zip(prompts, params, strict=True)]

    for _ in range(20):
        found = drawn(torch.from_numpy(logits), *states)
        for row, one in enumerate(states):
            wanted = reference.penalise(
                logits[row].astype(np.float64), one.params, prompts[row][:1], prompts[row][1:], ()
            )
            assert found[row] == int(np.argmax(wanted))
        for row, one in enumerate(states):
            one.append(found[row])
            prompts[row].append(found[row])
        logits = generator.normal(size=(3, VOCAB)).astype(np.float32)


def test_what_is_taken_back_is_drawn_again_alike():
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32))
    one = state([4], seed=11, **MARKED)
    texts = []
    for _ in range(2):
        one.truncate(0)
        text = []
        for _ in range(12):
            (token,) = drawn(logits, one)
            one.append(token)
            text.append(token)
        texts.append(text)

    assert texts[0] == texts[1]


def test_a_marked_text_is_told_from_one_that_is_not():
    """By the score of the paper: how many deviations more tokens are green than by chance."""

    def score(**params: object) -> float:
        generator = np.random.default_rng(2)
        one, previous, num_green = state([4], seed=5, **params), 4, 0
        for _ in range(200):
            logits = torch.from_numpy(generator.normal(size=(1, VOCAB)).astype(np.float32))
            (token,) = drawn(logits, one)
            num_green += token in reference.green(previous, VOCAB, 0.5)
            one.append(token)
            previous = token
        return (num_green - 100) / 50**0.5

    assert score(**MARKED) > 6
    assert abs(score()) < 4
