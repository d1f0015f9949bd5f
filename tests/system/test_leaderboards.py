"""lm-evaluation-harness scores the model on both runners and, by its own hf model, the same weights: the numbers agree.

The bf16 folder is the bundled GGUF file with its weights written out.
"""

import math
from dataclasses import dataclass
from typing import Any

import lm_eval
import pytest
from datasets import Dataset
from hf_models import smollm2_bf16
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

pytestmark = [
    pytest.mark.slow,
    # What the harness finds deprecated or leaves open is none of the server's business.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# In nats a token. The torch runner has 16-bit keys and values where the harness' model has float32 ones; llama.cpp also
# rounds the inputs of its quantized products to 8 bits.
MEAN_TOLERANCES = {"torch": 1e-3, "gguf": 0.25}
WINDOW = 64  # tokens; so that the longer text takes several windows

CHOICES = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "a fish"], "answer": 0},
    {"question": "Fire is", "choices": ["cold", "hot"], "answer": 1},
    {"question": "In 1969, for the first time, a man walked on the", "choices": ["moon", "sun"], "answer": 0},
]
TEXTS = [
    {"text": "Water boils at one hundred degrees, and then it is steam. " * 10},
    {"text": "안녕하세요 naïve café 😀"},
]
COUNTING = [{"question": f"{n}, {n + 1}, {n + 2}, {n + 3},", "answer": f"{n + 4}, {n + 5}"} for n in (1, 5)]
STOPS = [", 7", ", 11", "Question:", "</s>", "<|im_end|>"]  # of such kinds, and as many, as GSM8K has


def task(name: str, kind: str, rows: list[dict[str, Any]], **config: object) -> ConfigurableTask:
    """A task with inline data."""

    def load(**_: object) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(rows)}

    return ConfigurableTask(
        config={"task": name, "output_type": kind, "custom_dataset": load, "test_split": "test", **config}
    )


@dataclass(frozen=True, slots=True)
class Results:
    """What the harness found: one response for each request of a task, and each task's metrics."""

    responses: dict[str, list[Any]]
    metrics: dict[str, dict[str, Any]]


def evaluate(lm: object) -> Results:
    """Every kind of task that leaderboards have."""
    tasks = [
        task(
            "choices",
            "multiple_choice",
            CHOICES,
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc"}],
        ),
        task(
            "texts",
            "loglikelihood_rolling",
            TEXTS,
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
        task(
            "counting",
            "generate_until",
            COUNTING,
            doc_to_text="{{question}}",
            doc_to_target=" {{answer}}",
            generation_kwargs={"until": STOPS, "max_gen_toks": 12},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]
    # simple_evaluate would first ask pip and git about this machine, which takes half a minute
    found = lm_eval.evaluate(lm, {task.config.task: task for task in tasks}, bootstrap_iters=0)
    assert found is not None
    samples = found["samples"]
    responses = {name: [r[0] for sample in samples[name] for r in sample["resps"]] for name in samples}
    return Results(responses, found["results"])


@pytest.fixture(scope="module")
def own_model() -> HFLM:
    return HFLM(pretrained=str(smollm2_bf16()), device="cpu", dtype="float32", batch_size=3, max_length=WINDOW)


@pytest.fixture(scope="module")
def expected(own_model: HFLM) -> Results:
    return evaluate(own_model)


@pytest.fixture(scope="module", params=MEAN_TOLERANCES)
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def served(runner: str, request: pytest.FixtureRequest) -> Results:
    url: str = request.getfixturevalue("server_url" if runner == "gguf" else "torch_server_url")
    return evaluate(
        LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="dummy",
            tokenizer_backend="remote",
            num_concurrent=2,
            batch_size=3,  # token ids of several prompts in one request, of mixed lengths
            max_retries=1,
            max_length=WINDOW + 2,  # it takes off one for the written token, and one for the context
        )
    )


def test_choices_have_the_likelihoods_of_the_harness_own_model(
    runner: str, served: Results, expected: Results, own_model: HFLM
) -> None:
    texts = [" " + choice for row in CHOICES for choice in row["choices"]]
    num_tokens = sum(len(own_model.tok_encode(text)) for text in texts)
    ours, theirs = served.responses["choices"], expected.responses["choices"]
    difference = sum(abs(score - other) for (score, _), (other, _) in zip(ours, theirs, strict=True))
    assert difference / num_tokens < MEAN_TOLERANCES[runner]
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert served.metrics["choices"]["acc,none"] == expected.metrics["choices"]["acc,none"] == 1.0


def test_texts_have_the_likelihoods_of_the_harness_own_model_over_all_their_windows(
    runner: str, served: Results, expected: Results, own_model: HFLM
) -> None:
    num_tokens = [len(own_model.tok_encode(row["text"])) for row in TEXTS]
    assert num_tokens[0] > 2 * WINDOW
    for score, other, num in zip(served.responses["texts"], expected.responses["texts"], num_tokens, strict=True):
        assert abs(score - other) / num < MEAN_TOLERANCES[runner]
    bits = [run.metrics["texts"]["bits_per_byte,none"] for run in (served, expected)]
    assert abs(bits[0] - bits[1]) < MEAN_TOLERANCES[runner] / math.log(2)


def test_texts_are_written_up_to_the_same_stop(served: Results, expected: Results) -> None:
    assert served.responses["counting"] == expected.responses["counting"] == [" 5, 6", " 9, 10"]
    assert served.metrics["counting"]["exact_match,none"] == 1.0
