"""The real server and the real model, driven by curl's request and the text-generation package."""

import asyncio
import re

import httpx
import pytest
from fake_api import events
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Response

CURL_BODY = (
    '{"inputs":"[INST] <<SYS>>\\nYou are a helpful assistant.\\n<</SYS>>\\n\\nWhat type of model are you? [/INST]",'
    '"parameters":{"do_sample": true, "max_new_tokens": 100, "repetition_penalty": 1.15, "temperature": 0.7, '
    '"top_k": 20, "top_p": 0.9, "best_of": 1}}'
)
# the package calls a method that pydantic has renamed
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")

HEADERS = {"content-type": "application/json"}
PROMPT = "1, 2, 3, 4, 5, 6, 7,"  # no near ties: other batches, and a cached part, round otherwise
HANGUL = "안녕하세요 " * 6 + "안녕"


@pytest.fixture(scope="module")
def client(server_url: str) -> Client:
    return Client(server_url, timeout=60)


def test_the_request_that_users_paste_is_answered_with_one_key(server_url: str) -> None:
    reply = httpx.post(f"{server_url}/generate", content=CURL_BODY, headers=HEADERS, timeout=60)
    assert reply.status_code == 200
    assert list(reply.json()) == ["generated_text"]
    assert isinstance(reply.json()["generated_text"], str)


def test_its_streaming_twin_is_answered_with_events(server_url: str) -> None:
    reply = httpx.post(f"{server_url}/generate_stream", content=CURL_BODY, headers=HEADERS, timeout=60)
    assert reply.status_code == 200
    *rest, last = events(reply.text)
    assert all(event["generated_text"] is None for event in rest)
    tokens = [event["token"] for event in (*rest, last)]
    assert "".join(token["text"] for token in tokens if not token["special"]) == last["generated_text"]


def test_the_client_generates(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=8)
    assert answer.generated_text == " 8, 9, 1"
    assert answer.details.generated_tokens == len(answer.details.tokens) == 8
    assert answer.details.finish_reason == "length"
    assert answer.details.seed is None


def test_the_clients_stream_joins_to_the_whole_answer(client: Client) -> None:
    whole = client.generate(PROMPT, max_new_tokens=12).generated_text
    replies = list(client.generate_stream(PROMPT, max_new_tokens=12))
    assert "".join(reply.token.text for reply in replies if not reply.token.special) == whole
    assert replies[-1].generated_text == whole
    assert replies[-1].details is not None
    assert replies[-1].details.generated_tokens == 12


def test_the_client_gets_every_detail_that_it_asks_for(client: Client) -> None:
    answer = client.generate(
        PROMPT,
        max_new_tokens=4,
        do_sample=True,
        best_of=2,
        top_n_tokens=2,
        decoder_input_details=True,
        return_full_text=True,
        stop_sequences=["zzz"],
        truncate=100,
        typical_p=0.95,
        frequency_penalty=0.1,
    )
    assert answer.generated_text.startswith(PROMPT)
    assert answer.details.prefill[0].logprob is None
    assert answer.details.best_of_sequences is not None
    assert len(answer.details.best_of_sequences) == 1
    mean = [
        sum(token.logprob for token in sequence.tokens) / len(sequence.tokens)
        for sequence in (answer.details, answer.details.best_of_sequences[0])
    ]
    assert mean[0] >= mean[1], "the likeliest one comes first"
    assert answer.details.top_tokens is not None
    assert all(answer.details.top_tokens)  # one alone where typical_p leaves no second one


def test_a_stop_sequence_stays_at_the_end(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=20, stop_sequences=["9, 10"])
    assert answer.details.finish_reason == "stop_sequence"
    assert answer.generated_text == " 8, 9, 10"


def test_a_seed_is_told_and_gives_the_text_again(client: Client) -> None:
    # So hot that both tokens are about as likely whatever the rounding of their logits: the seed alone decides.
    def ask(seed: int | None = None) -> Response:
        return client.generate(PROMPT, do_sample=True, max_new_tokens=1, temperature=100.0, top_k=2, seed=seed)

    for _ in range(8):
        first = ask()
        assert first.details.seed is not None
        assert ask(first.details.seed).generated_text == first.generated_text


def test_the_clients_chat_is_answered(client: Client) -> None:
    answer = client.chat([{"role": "user", "content": "Hello!"}], max_tokens=5)
    assert answer.choices[0].message.content
    assert answer.usage["completion_tokens"] <= 5
    assert answer.system_fingerprint


def test_refusals_reach_the_client_as_its_own_exceptions(server_url: str, client: Client) -> None:
    with pytest.raises(ValidationError, match=r"must have less than|must be <="):
        client.generate("x " * 20000, max_new_tokens=1)
    with pytest.raises(ValidationError, match=r"grammar is not valid: .*unclosed group"):
        client.generate("x", grammar={"type": "regex", "value": "(a"})


def test_a_grammar_is_followed(client: Client) -> None:
    answer = client.generate("My number is", max_new_tokens=20, grammar={"type": "regex", "value": "[0-9]{3}-[0-9]{2}"})
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", answer.generated_text)
    assert answer.details.finish_reason == "eos_token"


async def test_the_async_client_streams_side_by_side(server_url: str) -> None:
    async def ask(prompt: str) -> str:
        client = AsyncClient(server_url, timeout=60)
        stream = client.generate_stream(prompt, max_new_tokens=10)
        return "".join([reply.token.text async for reply in stream])

    alone = await ask(PROMPT)
    together = await asyncio.gather(*(ask(PROMPT) for _ in range(4)))
    assert set(together) == {alone}


@pytest.mark.parametrize("text", [HANGUL, "😀" * 12])
def test_torn_characters_give_empty_tokens_until_they_are_whole(server_url: str, text: str) -> None:
    body = {"inputs": text, "parameters": {"max_new_tokens": 30}}
    reply = httpx.post(f"{server_url}/generate_stream", json=body, timeout=60)
    *rest, last = events(reply.text)
    texts = [event["token"]["text"] for event in (*rest, last) if not event["token"]["special"]]
    whole = httpx.post(f"{server_url}/generate", json=body, timeout=60).json()["generated_text"]
    assert last["generated_text"] == whole
    assert "".join(texts) == whole.rstrip("\ufffd")  # the limit may fall inside the last character
    assert any(ord(char) > 0x7F for char in whole)
    assert not any("\ufffd" in piece for piece in texts)
