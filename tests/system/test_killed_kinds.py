"""The engine is killed with -9, or stands still, in the middle of each kind of answer: all go on to their ends."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from checkout import DATA
from real_server import RunningServer, engine_pid, run_server

pytestmark = pytest.mark.slow

PATIENCE_S = 300
LENGTH = 24
SEEDED = {"temperature": 1.2, "seed": 5, "max_tokens": LENGTH, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
OPTIONS = ("--gguf-engine=llama.cpp", "--threads=1", "--max-model-len=1024")
KINDS: Mapping[str, dict[str, Any]] = {
    "greedy, with log probabilities": {**SEEDED, "temperature": 0, "logprobs": 2},
    "penalties": {**SEEDED, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "dry_multiplier": 1.0},
    "mirostat": {**SEEDED, "mirostat_mode": 2, "mirostat_tau": 3.0},
    "adaptive-p": {**SEEDED, "adaptive_target": 0.4},
    "banned strings": {**SEEDED, "banned_strings": ["the", " a", "and", "ing", "e ", "s,"]},
    "stop strings behind a least length": {**SEEDED, "ignore_eos": False, "min_tokens": 12, "stop": ["e", "a", "\n"]},
    "a negative prompt": {**SEEDED, "negative_prompt": "A dull story", "guidance_scale": 1.6},
    "a regular expression": {**SEEDED, "ignore_eos": False, "guided_regex": "([a-m]{2} [n-z]{3}, ){5}"},
    "a JSON schema": {**SEEDED, "ignore_eos": False, "max_tokens": 60, "guided_json": SCHEMA},
    "a tool": {**SEEDED, "ignore_eos": False, "max_tokens": 90, "tools": [WEATHER], "tool_choice": "required"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with run_server(*OPTIONS) as running:
        yield running


@dataclass
class Told:
    """What a client was told of one choice."""

    text: str = ""
    calls: str = ""
    tokens: list[object] = field(default_factory=list)
    finish: str | None = None


def read(server: RunningServer, body: dict[str, Any], disturb: Callable[[], None], at: int = 0) -> dict[int, Told]:
    """Every choice of a stream; `disturb` is called when so many events have come."""
    path = "/v1/chat/completions" if "tools" in body else "/v1/completions"
    what = {"messages": [{"role": "user", "content": "Oslo?"}]} if "tools" in body else {"prompt": "Once upon a time"}
    told: dict[int, Told] = {}
    count, last = 0, ""
    with httpx.stream("POST", server.url + path, json={**what, **body, "stream": True}, timeout=PATIENCE_S) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            last = line or last
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                one = told.setdefault(choice["index"], Told())
                delta = choice.get("delta", {})
                one.text += choice.get("text") or delta.get("content") or ""
                one.calls += "".join(
                    call["function"].get("name", "") + call["function"].get("arguments", "")
                    for call in delta.get("tool_calls") or ()
                )
                one.tokens += (choice.get("logprobs") or {}).get("token_logprobs", ())
                one.finish = choice["finish_reason"] or one.finish
            count += 1
            if count == at:
                disturb()
    assert last == "data: [DONE]"
    assert at <= count
    return told


def kill(server: RunningServer) -> None:
    os.kill(engine_pid(server.process.pid), signal.SIGKILL)


def stop(server: RunningServer) -> None:
    os.kill(engine_pid(server.process.pid), signal.SIGSTOP)


class Killer(threading.Thread):
    """Kills the engine once it has written something of the next answer."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__()
        self._server = server
        self._before = self._metric("tightrope_generated_tokens_total")
        self.num_running = 0.0

    def run(self) -> None:
        while not self.num_running or self._metric("tightrope_generated_tokens_total") < self._before + 20:
            self.num_running = max(self.num_running, self._metric("tgi_batch_current_size"))
        kill(self._server)

    def _metric(self, name: str) -> float:
        text = httpx.get(f"{self._server.url}/metrics", timeout=PATIENCE_S).text
        return float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0])


def until_well(server: RunningServer) -> None:
    while httpx.get(f"{server.url}/health", timeout=PATIENCE_S).status_code != 200:
        assert server.process.poll() is None


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_answer_goes_on_as_the_very_text_that_it_would_have_been(server: RunningServer, kind: str):
    until_well(server)
    whole = read(server, {**KINDS[kind], "cache_salt": f"whole {kind}"}, lambda: None)
    assert whole[0].text or whole[0].calls
    until_well(server)
    assert read(server, {**KINDS[kind], "cache_salt": f"killed {kind}"}, lambda: kill(server), 5) == whole


def test_an_answer_that_a_stuck_engine_held_goes_on_too():
    with run_server(*OPTIONS, "--stuck-after=8") as server:
        body = KINDS["mirostat"]
        whole = read(server, {**body, "cache_salt": "whole"}, lambda: None)
        assert read(server, {**body, "cache_salt": "stuck"}, lambda: stop(server), 5) == whole
        assert "no sign of life" in server.errors()


def test_all_choices_go_on_and_none_loses_a_token(server: RunningServer):
    until_well(server)
    told = read(server, {**SEEDED, "n": 3, "logprobs": 0, "cache_salt": "n"}, lambda: kill(server), 10)
    assert sorted(told) == [0, 1, 2]
    assert {(len(one.tokens), one.finish) for one in told.values()} == {(LENGTH, "length")}
    assert len({one.text for one in told.values()}) == 3


def test_a_whole_answer_of_the_best_choices_is_given_all_the_same(server: RunningServer):
    until_well(server)
    body = {**SEEDED, "max_tokens": 100, "prompt": "Once", "n": 2, "best_of": 4, "logprobs": 0, "cache_salt": "best"}
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        (killer := Killer(server)).start()
        answer = client.post("/v1/completions", json=body)
        killer.join()
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [100, 100]
    assert answer.json()["usage"]["completion_tokens"] == 400
    assert killer.num_running > 1


def test_an_answer_of_an_adapter_goes_on_with_the_adapter():
    folder = DATA / "adapters"
    with run_server(str(folder / "llama-bf16"), "--lora", f"lora={folder / 'llama-lora-r4'}") as server:
        body = {**SEEDED, "temperature": 0, "model": "lora", "logprobs": 1}
        whole = read(server, {**body, "cache_salt": "whole"}, lambda: None)
        assert whole != read(server, {**body, "model": "llama-bf16", "cache_salt": "without"}, lambda: None)
        assert read(server, {**body, "cache_salt": "killed"}, lambda: kill(server), 5) == whole
