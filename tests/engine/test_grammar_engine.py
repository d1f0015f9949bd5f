"""Answers under a grammar, through the whole loop: a model of dice writes nothing but what the grammar allows."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import engine_runs
import jsonschema
import pytest
import torch
from engine_runs import make_core, run, text_of
from fakes import EOS, VOCAB_SIZE, FakeBackend, script

from tightrope.engine.core import EngineCore
from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Finish, GenerateRequest, Grammar, LogprobRequest, Token

NUM_SCHEMAS, NUM_EACH = 50, 20
NUMBERS = Grammar("regex", "([0-9]{3}-){4}[0-9]{3}", "regex")


class DiceBackend(FakeBackend):
    """Every token is as likely as its die says; what closes a string, list or object has a better one."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)  # type: ignore[arg-type]
        self._dice = torch.Generator().manual_seed(5)
        self._bonus = torch.zeros(VOCAB_SIZE)
        self._bonus[list(b'"}],')] = 3.0

    def _row(self, so_far: Sequence[int]) -> torch.Tensor:
        return torch.randn(VOCAB_SIZE, generator=self._dice) + self._bonus


def request(request_id: str, grammar: Grammar | None, n: int = 1, **fields: Any) -> GenerateRequest:  # noqa: ANN401
    fields = {"max_tokens": 600, "sampling": SamplingParams(seed=7), **fields}
    return engine_runs.request(request_id, "?", grammar=grammar, n=n, **fields)


def answers(backend: FakeBackend, *requests: GenerateRequest) -> dict[tuple[str, int], tuple[str, Finish, list[Token]]]:
    """Text, end and tokens of each choice."""
    found = run(make_core(backend, max_best_of=NUM_EACH), *requests)
    return {
        (request_id, last.index): (
            text_of(deltas, last.index),
            last.finish,
            [token for delta in deltas if delta.index == last.index for token in delta.tokens],
        )
        for request_id, deltas in found.items()
        for last in deltas
        if last.finish is not None
    }


def some_schema(rng: random.Random, depth: int = 2) -> dict[str, object]:
    """A schema whose values are short."""
    kinds = ["integer", "number", "string", "pattern", "format", "enum", "null"]
    kind = rng.choice([*kinds, "object", "object", "array", "anyOf"] if depth else kinds)
    inner = [some_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))] if depth else []
    match kind:
        case "integer":
            return {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 5000)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 9)}
        case "string":
            return {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-f]{2,6}$", r"^\d{3}(-\d{2})?$", "^(x|yz)+$"])}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])}
        case "enum":
            return {"enum": rng.sample(["red", "green", "blü", 5, 1.5, None, True], 3)}
        case "object":
            names = rng.sample(["name", "age", "größe", "a b", "x"], len(inner))
            return {
                "type": "object",
                "properties": dict(zip(names, inner, strict=True)),
                "required": names[: rng.randint(0, len(names))],
                "additionalProperties": False,
            }
        case "array":
            return {"type": "array", "items": inner[0], "minItems": rng.randint(0, 1), "maxItems": 3}
        case "anyOf":
            return {"anyOf": inner}
    return {"type": "null"}


def test_a_thousand_answers_are_valid_under_their_schemas():
    rng = random.Random(11)
    schemas = [some_schema(rng) for _ in range(NUM_SCHEMAS)]
    requests = [
        request(f"r{number}", Grammar("json_schema", json.dumps(schema), "json_schema"), NUM_EACH)
        for number, schema in enumerate(schemas)
    ]
    done = answers(DiceBackend(max_num_seqs=32, capacity=2048), *requests)
    assert len(done) == 1000
    for (request_id, _), (text, finish, _) in done.items():
        assert finish.reason == "eos", text
        jsonschema.Draft202012Validator(schemas[int(request_id[1:])]).validate(json.loads(text))
    assert len({text for text, _, _ in done.values()}) > 500


def test_rows_without_a_grammar_are_drawn_as_if_alone():
    free = request("free", None, max_tokens=20)
    alone = answers(FakeBackend(), free)["free", 0][0]
    grammars = [request(f"r{i}", NUMBERS) for i in range(3)]
    together = answers(FakeBackend(), grammars[0], free, *grammars[1:])
    assert together["free", 0][0] == alone
    assert all(re.fullmatch(NUMBERS.text, together[f"r{i}", 0][0]) for i in range(3))


def test_the_text_ends_with_the_grammar_and_no_end_token_is_waited_for():
    text, finish, tokens = answers(FakeBackend(), request("r", Grammar("choice", '["yes", "yesterday"]', "c")))["r", 0]
    assert finish.reason == "eos"
    assert text in ("yes", "yesterday")
    text, finish, tokens = answers(FakeBackend(), request("r", Grammar("choice", '["no"]', "c")))["r", 0]
    assert (text, finish.reason, len(tokens)) == ("no", "eos", 2)


def test_a_model_that_wants_to_end_writes_on_until_the_grammar_lets_it():
    def always_ends(token_ids: Sequence[int]) -> int:
        return EOS

    text, finish, _ = answers(FakeBackend(always_ends), request("r", Grammar("regex", "(ab){2,}", "regex")))["r", 0]
    assert (text, finish.reason) == ("abab", "eos")


def test_an_answer_cut_by_its_limit_says_so():
    cut = request("r", NUMBERS, max_tokens=5)
    text, finish, _ = answers(DiceBackend(), cut)["r", 0]
    assert finish.reason == "length"
    assert len(text) == 5
    whole = request("r", Grammar("regex", "abcde", "regex"), max_tokens=5)
    assert answers(DiceBackend(), whole)["r", 0][1].reason == "eos"


def test_a_grammar_that_asks_for_too_much_at_once_ends_with_an_error():
    many = " | ".join(f'"{number}" c' for number in range(3000))
    costly = Grammar("grammar", f'start: "x" c ({many})\nc: "x"', "grammar")
    _, finish, _ = answers(FakeBackend(script("x")), request("r", costly))["r", 0]
    assert finish.reason == "error"
    assert finish.message is not None
    assert finish.message.startswith("the grammar can't be followed any further: ")


def test_preemption_does_not_disturb_a_grammar():
    def texts(capacity: int) -> list[str]:
        backend = FakeBackend(capacity=capacity)  # its logits depend on the tokens alone
        requests = [request(f"r{i}", NUMBERS, max_tokens=30) for i in range(4)]
        return [text for (text, _, _) in answers(backend, *requests).values()]

    assert all(re.fullmatch(NUMBERS.text, text) for text in texts(50))
    assert texts(50) == texts(4096)


def test_raw_log_probabilities_are_of_the_model_and_processed_ones_of_the_grammar():
    grammar = Grammar("choice", '["no"]', "choice")
    for processed in (False, True):
        asked = request("r", grammar, logprobs=LogprobRequest(processed=processed, top=2))
        tokens = answers(DiceBackend(), asked)["r", 0][2]
        for token in tokens:
            assert token.logprob is not None
            assert (token.logprob == 0) is processed
            assert len(token.top) == (1 if processed else 2)


def test_a_grammar_is_refused_after_the_prompts_length_was_checked():
    backend = FakeBackend()
    core = EngineCore(backend, LimitSettings())
    too_long = "?" * backend.card.max_model_len  # A BOS stands in front.
    with pytest.raises(InvalidRequest, match="context length"):
        core.prepare(engine_runs.request("r", too_long, grammar=Grammar("regex", "(", "regex")))
    with pytest.raises(InvalidRequest, match="regex: "):
        core.prepare(request("r", Grammar("regex", "(", "regex")))


def test_a_banned_string_takes_the_grammar_back_with_the_text():
    sampling = SamplingParams(temperature=0.0, banned_strings=("nono",))
    either = engine_runs.request("r", "?", sampling=sampling, grammar=Grammar("regex", "nono|yes", "regex"))
    text, finish, tokens = answers(FakeBackend(script("nono")), either)["r", 0]
    assert (text, finish.reason) == ("yes", "eos")
    assert "".join(token.text for token in tokens) == text
