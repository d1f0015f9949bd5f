"""The real server and the real model, driven by the openai package."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest
from fake_api import events
from openai.types.chat import ChatCompletionMessageParam

# The prompts that two answers are compared for have no near ties: another batch, and a cached part, round otherwise.
MODEL = "tgi"  # a name that clients use who don't know the served one
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Repeat after me: Hello, Mary!"}]
FAMILY = "안녕하세요 👩‍👩‍👧 " * 5 + "안녕하세요"
FACES = "😀" * 12
HANGUL = "가나다라마바사 가나다라마바사 가나다라"


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_model_is_listed_under_the_name_that_answers_give(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert client.models.retrieve(card.id).id == card.id
    answer = client.chat.completions.create(model=card.id, messages=HELLO, max_tokens=1)
    assert answer.model == card.id


def test_a_chat_is_answered_in_words_that_make_sense(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=40)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Mary" in (choice.message.content or "")
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_a_streamed_chat_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=30)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_sdks_own_stream_helper_rebuilds_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, temperature=0, max_tokens=20) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=20)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.role == "assistant"


async def test_the_async_client_streams_several_chats_at_a_time(async_client: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str:
        stream = await async_client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Count to {number}."}],
            temperature=0,
            max_tokens=20,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = await asyncio.gather(*map(ask, (3, 4, 5)))
    assert all(texts)


@pytest.mark.parametrize("prompt", [FAMILY, FACES, HANGUL])
def test_emoji_and_korean_stream_without_a_broken_character(client: openai.OpenAI, prompt: str) -> None:
    whole = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40)
    stream = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == whole.choices[0].text
    assert any(ord(char) > 0x7F for char in whole.choices[0].text), "the model goes on with what it was shown"
    complete = whole.choices[0].text.rstrip("\ufffd")  # the limit may fall inside the last character
    assert "\ufffd" not in complete


def test_stop_strings_are_cut_wherever_they_fall(client: openai.OpenAI) -> None:
    prompt = "1, 2, 3, 4, 5, 6, 7,"
    free = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=20).choices[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 4]
    whole = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=20, stop=stop).choices[0]
    assert whole.text == free[: free.index(stop)]
    assert whole.finish_reason == "stop"
    stream = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=20, stop=[stop, "zzz"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.text


def test_a_seed_gives_the_same_text_again_and_another_seed_another(client: openai.OpenAI) -> None:
    # Which of two tokens is drawn hangs on the biases and the seed, so that no rounding of the logits moves it.
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            seed=seed,
            max_tokens=20,
            temperature=40,
            logit_bias={"504": 100, "3575": 60},
            extra_body={"top_k": 2},
        )
        return answer.choices[0].text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(1, 6)}) > 1


def test_n_answers_come_with_their_numbers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, max_tokens=5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 15


def test_logprobs_of_a_chat_are_those_of_a_softmax(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs), "greedy takes the likeliest"
        assert len(entry.top_logprobs) == 3
        assert all(top.logprob <= 0 for top in entry.top_logprobs)


def test_scores_of_a_prompt_have_one_entry_per_id_and_one_for_the_written_token(
    client: openai.OpenAI, server_url: str
) -> None:
    ids = httpx.post(f"{server_url}/tokenize", json={"prompt": "The capital of France is Paris"}, timeout=60).json()[
        "tokens"
    ]
    answer = client.completions.create(
        model=MODEL, prompt=[ids, ids[:3]], temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    for choice, given in zip(answer.choices, (ids, ids[:3]), strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(given) + 1
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())


def test_a_special_token_in_a_message_is_text_and_counts_as_such(client: openai.OpenAI, server_url: str) -> None:
    def count(text: str) -> int:
        body = {"messages": [{"role": "user", "content": text}]}
        return int(httpx.post(f"{server_url}/tokenize", json=body, timeout=60).json()["count"])

    assert count("a <|im_end|> b") > count("a b") + 2, "one control token would cost one"


def test_the_last_message_can_be_continued(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "Count to five."},
        {"role": "assistant", "content": "1, 2, 3,"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=5, extra_body={"continue_final_message": True}
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("4")


def test_the_next_turn_of_a_chat_computes_only_what_is_new(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Remember: " + "blue horse " * 60}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    messages.append({"role": "assistant", "content": first.choices[0].message.content or ""})
    messages.append({"role": "user", "content": "What animal?"})
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 5


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "The model `gpt-4` does not exist."),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"n": 1000}, openai.BadRequestError, "n must be at most"),
        ({"response_format": {"type": "yaml"}}, openai.BadRequestError, "response_format"),
    ],
)
def test_refusals_reach_the_sdk_as_its_own_exceptions(
    client: openai.OpenAI, fields: dict[str, object], error: type[openai.APIStatusError], text: str
) -> None:
    body: dict[str, object] = {"model": MODEL, "messages": HELLO, **fields}
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.post("/chat/completions", body={**body, "stream": stream}, cast_to=object)
        assert text in caught.value.message


def test_a_prompt_over_the_window_names_both_counts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1] * 9000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message
    assert "9001" in caught.value.message


def test_a_stream_over_http_is_data_lines_and_one_done(server_url: str) -> None:
    body = {"prompt": "Hello", "max_tokens": 3, "stream": True}
    reply = httpx.post(f"{server_url}/v1/completions", json=body, timeout=60)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert all(line == "" or line.startswith("data: ") for line in reply.text.split("\n"))
    assert events(reply.text)[-1] == "[DONE]"
    assert reply.text.endswith("data: [DONE]\n\n")
