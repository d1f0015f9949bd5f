"""Adapters that brought tokens of their own: who names one may use them, and nobody else notices."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import engine_runs
import httpx
import pytest
import torch
from checkout import ADAPTERS
from real_server import RunningServer, run_server
from test_adapter_tables import adapted, logits_of, pytestmark
from test_adapters import open_model
from tokenizers import AddedToken, Tokenizer

from tightrope.engine.core import EngineCore
from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import GenerateRequest, Grammar, LogprobRequest, TokenPrompt

__all__ = ["pytestmark"]

BASE = ADAPTERS / "llama-untied-bf16"
START, END = 512, 513  # ids of the adapter's tokens, behind the base's
PROMPT = [5, START, 33, 101]
ENDING = [40, 3, START, 90]  # after which the adapter writes its end


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter over two more tokens, as peft saves it beside its tokenizer; and the logits after PROMPT."""
    folder = tmp_path_factory.mktemp("grown")
    model = adapted(BASE, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], resize=2)
    states: list[torch.Tensor] = []
    hook = model.base_model.model.model.norm.register_forward_hook(lambda *given: states.append(given[2]))
    logits_of(model, [ENDING])
    hook.remove()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data[END] = states[0][0, -1]
    model.save_pretrained(str(folder))
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<|turn|>", "<|done|>")])
    assert tokenizer.token_to_id("<|done|>") == END
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((BASE / "tokenizer_config.json").read_text()) | {"eos_token": "<|done|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, logits_of(model, [PROMPT])[0]


def request(name: str, prompt: str | list[int], adapter: str | None, **more: Any) -> GenerateRequest:  # noqa: ANN401
    given = TokenPrompt(tuple(prompt)) if isinstance(prompt, list) else prompt
    return engine_runs.request(name, given, adapter=adapter, max_tokens=6, **more)


def run(core: EngineCore, *requests: GenerateRequest) -> dict[str, list[int]]:
    found = engine_runs.run(core, *requests)
    return {name: [token.token_id for delta in deltas for token in delta.tokens] for name, deltas in found.items()}


def test_requests_with_and_without_the_tokens_run_in_one_step_whatever_they_ask_for(grown: tuple[Path, torch.Tensor]):
    digits = Grammar("regex", "[0-9]{3}", "regex")
    asked_for: list[dict[str, Any]] = [
        {},
        {"grammar": digits},
        {"sampling": SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.3, min_p=0.02)},
        {"sampling": SamplingParams(temperature=1.0, seed=3, mirostat_mode=1, mirostat_tau=4.0)},
        {"sampling": SamplingParams(temperature=1.0, seed=3, top_n_sigma=1.0)},
        {"logprobs": LogprobRequest(processed=False, top=5)},
    ]
    with closing(open_model(BASE, grown=grown[0])) as backend:
        core = EngineCore(backend, LimitSettings(), adapter_paths={"grown": str(grown[0])})
        plain = [request(f"p{i}", [5, 9, 33, 101], None, **wanted) for i, wanted in enumerate(asked_for)]
        own = [request(f"o{i}", PROMPT, "grown", **wanted) for i, wanted in enumerate(asked_for)]
        alone = {name: ids for one in (*plain, *own) for name, ids in run(core, one).items()}
        pairs = [run(core, *pair) for pair in zip(plain, own, strict=True)]

    assert {name: ids for pair in pairs for name, ids in pair.items()} == alone
    assert all(max(ids) < START for name, ids in alone.items() if name.startswith("p"))


def test_tokens_of_an_adapter_are_unknown_without_it(grown: tuple[Path, torch.Tensor]):
    with closing(open_model(BASE, grown=grown[0])) as backend:
        core = EngineCore(backend, LimitSettings(), adapter_paths={"grown": str(grown[0])})
        for adapter, token_id, size in ((None, START, 512), ("grown", 514, 514)):
            with pytest.raises(InvalidRequest, match=f"token id {token_id} is outside the vocabulary of {size}"):
                core.prepare(request("r", [5, token_id], adapter))
        text = "<|turn|>user"
        own, theirs = (core.prepare(request("r", text, adapter))[0].own.token_ids for adapter in ("grown", None))

    assert START in own
    assert max(theirs) < START


def test_an_adapter_without_a_tokenizer_takes_its_tokens_by_id(grown: tuple[Path, torch.Tensor], tmp_path: Path):
    folder = tmp_path / "bare"
    shutil.copytree(grown[0], folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with closing(open_model(BASE, bare=folder)) as backend:
        core = EngineCore(backend, LimitSettings(), adapter_paths={"bare": str(folder)})
        found = run(core, request("r", ENDING, "bare"))["r"]
        own, theirs = (core.prepare(request("r", "<|turn|>", adapter))[0].own.token_ids for adapter in ("bare", None))

    assert found[0] == END
    assert own == theirs


@pytest.fixture(scope="module")
def server(grown: tuple[Path, torch.Tensor]) -> Iterator[RunningServer]:
    with run_server("--model", str(BASE), "--kv-cache=f16", "--lora", f"grown={grown[0]}") as running:
        yield running


def test_a_grown_vocabulary_is_served_as_peft_has_it(server: RunningServer, grown: tuple[Path, torch.Tensor]):
    def ask(model: str, prompt: list[int], **more: Any) -> httpx.Response:  # noqa: ANN401 - fields of the API
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 4, **more}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    top = ask("grown", PROMPT, logprobs=5, max_tokens=1).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    wanted = torch.log_softmax(grown[1], -1).topk(5).values.tolist()
    assert sorted(top.values(), reverse=True) == pytest.approx(wanted, abs=5e-3)

    ended = ask("grown", ENDING).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert [ask(model, [5, i]).status_code for model, i in (("llama-untied-bf16", START), ("grown", 514))] == [400, 400]


def test_marks_of_an_adapter_that_a_person_types_in_a_chat_are_text(server: RunningServer):
    typed = {"messages": [{"role": "user", "content": "a <|turn|> b"}], "max_tokens": 1, "explain": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "grown", **typed}, timeout=60).json()
    parsed = {"model": "grown", "prompt": "a <|turn|> b", "max_tokens": 1, "explain": True}
    plain = httpx.post(f"{server.url}/v1/completions", json=parsed, timeout=60).json()

    assert START not in answer["explain"]["prompts"][0]["token_ids"]
    assert START in plain["explain"]["prompts"][0]["token_ids"]
