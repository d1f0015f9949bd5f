"""Banned strings on both runners: going back in a real cache leads to the text that a fresh start would write."""

import httpx
import pytest

PROMPT = "1, 2, 3, 4, 5, 6, 7,"  # no near ties: an answer from the cache rounds otherwise


def complete(url: str, **fields: object) -> str:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("runner", ["server_url", "torch_server_url"])
def test_what_is_banned_is_written_around_and_the_next_request_is_answered_as_before(
    request: pytest.FixtureRequest, runner: str
) -> None:
    url = request.getfixturevalue(runner)
    free = complete(url)
    words = free.split()
    banned = " ".join(words[2:4])
    text = complete(url, banned_strings=[banned])
    assert banned.lower() not in text.lower()
    assert text.split()[:2] == words[:2]
    assert complete(url) == free
