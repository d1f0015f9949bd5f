"""A chat that loses its oldest message, on a real server: what it costs, what is told of it, and how to turn it off."""

import re
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkout import ADAPTERS
from gguf_files import write_model
from real_server import run_server

FOLDER = str(ADAPTERS / "llama-bf16")
SYSTEM, OLDEST, SECOND, NEW = (
    [*range(10, 40)],
    [*range(100, 170)],
    [*range(200, 350)],
    [*range(400, 420)],
)
FULL, DROPPED = [*SYSTEM, *OLDEST, *SECOND], [*SYSTEM, *SECOND, *NEW]
NUM_MOVED = len(SECOND) - 64

_salts = map(str, count())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_server("--model", FOLDER, "--heal=off") as running:
        assert "what stands behind a removed message is moved" in running.output
        yield running.url


def ask(url: str, prompt: list[int], **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, **fields}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def reused(url: str, prompt: list[int], **fields: Any) -> tuple[int, int]:  # noqa: ANN401
    details = ask(url, prompt, **fields)["usage"]["prompt_tokens_details"]
    return details["cached_tokens"], details["moved_tokens"]


def metric(url: str, name: str) -> float:
    (value,) = re.findall(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics", timeout=60).text, re.MULTILINE)
    return float(value)


def test_usage_and_metrics_tell_what_was_found_and_how_much_of_it_was_moved(url: str) -> None:
    salt = next(_salts)
    before = metric(url, "tightrope_moved_tokens_total")

    assert reused(url, FULL, cache_salt=salt) == (0, 0)
    assert reused(url, DROPPED, cache_salt=salt) == (len(SYSTEM) + NUM_MOVED, NUM_MOVED)

    assert metric(url, "tightrope_moved_tokens_total") - before == NUM_MOVED
    assert metric(url, "tightrope_healed_tokens_total") == 0


def test_explain_tells_it_too(url: str) -> None:
    salt = next(_salts)
    reused(url, FULL, cache_salt=salt)

    (prompt,) = ask(url, DROPPED, cache_salt=salt, explain=True)["explain"]["prompts"]

    assert (prompt["tokens_reused"], prompt["tokens_moved"]) == (len(SYSTEM) + NUM_MOVED, NUM_MOVED)


@pytest.mark.parametrize("exact", [{"cache_reuse": "exact"}, {"seed": 3, "temperature": 1}, {"prompt_logprobs": 0}])
def test_a_request_can_ask_for_exact_tokens_alone(url: str, exact: dict[str, Any]) -> None:
    salt = next(_salts)
    reused(url, FULL, cache_salt=salt)
    reused(url, DROPPED, cache_salt=salt)

    cached, moved = reused(url, [*DROPPED, 7], cache_salt=salt, **exact)

    assert moved == 0
    assert cached < len(SYSTEM) + NUM_MOVED


def test_greedy_text_over_exact_tokens_is_that_of_a_server_that_never_saw_the_chat(url: str) -> None:
    salt, fresh = next(_salts), next(_salts)
    reused(url, FULL, cache_salt=salt)

    over_exact = ask(url, DROPPED, cache_salt=salt, cache_reuse="exact", max_tokens=12)
    alone = ask(url, DROPPED, cache_salt=fresh, max_tokens=12)

    assert over_exact["choices"][0]["text"] == alone["choices"][0]["text"]


def test_another_kind_of_reuse_is_refused_by_name(url: str) -> None:
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": DROPPED, "cache_reuse": "approximate"}, timeout=60)

    assert reply.status_code == 400
    assert "cache_reuse" in reply.json()["error"]["message"]


def test_exact_for_all_moves_nothing() -> None:
    with run_server("--model", FOLDER, "--cache-reuse=exact") as running:
        assert "exact ones alone, as asked" in running.output
        assert reused(running.url, FULL) == (0, 0)
        assert reused(running.url, DROPPED) == (len(SYSTEM), 0)


def test_a_server_with_nothing_else_to_do_computes_moved_tokens_again() -> None:
    with run_server("--model", FOLDER) as running:
        reused(running.url, FULL)
        assert reused(running.url, DROPPED)[1] == NUM_MOVED
        patience = time.monotonic() + 240
        while reused(running.url, DROPPED)[1]:
            assert time.monotonic() < patience

        assert reused(running.url, [*DROPPED, 7], cache_reuse="exact") == (len(DROPPED), 0)
        assert metric(running.url, "tightrope_healed_tokens_total") > 0
        assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200


def test_llama_cpp_moves_tokens_too_and_they_are_computed_again(tmp_path: Path) -> None:
    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "llama.gguf")
    with run_server("--model", str(path), "--gguf-engine=llama.cpp") as running:
        assert "what stands behind a removed message is moved" in running.output
        assert reused(running.url, FULL) == (0, 0)
        assert reused(running.url, DROPPED) == (len(SYSTEM) + len(SECOND), len(SECOND))
        patience = time.monotonic() + 240
        while reused(running.url, DROPPED)[1]:
            assert time.monotonic() < patience

        exact = reused(running.url, [*DROPPED, 7], cache_reuse="exact", temperature=1)
        assert exact == (len(DROPPED), 0)
        assert metric(running.url, "tightrope_healed_tokens_total") > 0


@pytest.mark.parametrize("option", ["--cache-reuse=some", "--heal=never"])
def test_what_the_settings_can_not_be_is_one_line(option: str) -> None:
    name = option.split("=")[0]
    with pytest.raises(AssertionError, match=f"did not start: .*{name}: "), run_server("--model", FOLDER, option):
        pass
