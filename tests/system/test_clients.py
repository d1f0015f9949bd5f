"""Clients as people install them, against the real server on both runners: the bundled GGUF file, and a bf16 folder."""

import json
from collections.abc import AsyncIterator, Iterator

import jsonschema
import openai
import pytest
from huggingface_hub import InferenceClient
from langchain_openai import ChatOpenAI
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import SecretStr
from text_generation import Client

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The `dict` method is deprecated"),  # text-generation calls it
]

# No near ties: both runners, every batch and every cached part of the prompt go on alike, whatever the rounding.
COUNTING = "1, 2, 3, 4, 5, 6, 7,"
COUNTED = " 8, 9, 1"
INSTRUCTION = "You are a helpful assistant."
QUESTION = "Repeat after me: Hello, Mary!"
ANSWER = "Hello, Mary!"


@pytest.fixture(scope="module", params=["gguf", "torch"])
def url(request: pytest.FixtureRequest) -> str:
    served: str = request.getfixturevalue("server_url" if request.param == "gguf" else "torch_server_url")
    return served


@pytest.fixture
def openai_client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def langchain_model(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key=SecretStr("none"), model="dummy", temperature=0, max_retries=0)


def test_openai_completes_whole_and_streamed(openai_client: OpenAI) -> None:
    whole = openai_client.completions.create(model="", prompt=COUNTING, max_tokens=8, temperature=0)
    assert whole.choices[0].text == COUNTED
    stream = openai_client.completions.create(model="", prompt=COUNTING, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == COUNTED


def test_openai_chats_whole_and_streamed(openai_client: OpenAI) -> None:
    whole = openai_client.chat.completions.create(
        model="",
        messages=[{"role": "developer", "content": INSTRUCTION}, {"role": "user", "content": QUESTION}],
        max_completion_tokens=30,
        temperature=0,
    )
    assert whole.choices[0].message.content == ANSWER
    stream = openai_client.chat.completions.create(
        model="", messages=[{"role": "user", "content": QUESTION}], max_tokens=30, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER


async def test_openai_streams_asynchronously(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.completions.create(
        model="", prompt=COUNTING, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == COUNTED
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_openai_gets_an_answer_of_the_schema(openai_client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = openai_client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "Mary is 30. Say so as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        temperature=0,
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_openai_calls_a_tool_whole_and_streamed(openai_client: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Seoul"]}}, "required": ["city"]}
    tool: ChatCompletionToolParam = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is the weather in Paris?"}]
    whole = openai_client.chat.completions.create(
        model="", messages=messages, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    (call,) = whole.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, whole.choices[0].finish_reason) == ("weather", "tool_calls")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Seoul")
    stream = openai_client.chat.completions.create(
        model="",
        messages=messages,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0,
        stream=True,
    )
    pieces = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or () if c.function is not None]
    assert [c.function.name for c in pieces if c.function is not None and c.function.name] == ["weather"]
    assert json.loads("".join(c.function.arguments or "" for c in pieces if c.function is not None))


def test_openai_scores_a_prompt_without_writing(openai_client: OpenAI) -> None:
    answer = openai_client.completions.create(model="", prompt=[504, 3575], echo=True, max_tokens=0, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1] < 0
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_text_generation_generates_and_streams(url: str) -> None:
    client = Client(url, timeout=60)
    answer = client.generate(COUNTING, max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
    assert answer.generated_text == COUNTED
    assert answer.details.prefill[-1].logprob is not None
    assert answer.details.top_tokens is not None
    assert answer.details.top_tokens[0][0].id == answer.details.tokens[0].id
    stream = client.generate_stream(COUNTING, max_new_tokens=8)
    assert "".join(reply.token.text for reply in stream) == COUNTED


def test_huggingface_hub_generates_chats_and_asks_for_the_model(url: str) -> None:
    client = InferenceClient(url, timeout=60)
    assert client.text_generation(COUNTING, max_new_tokens=8, return_full_text=False) == COUNTED
    streamed = client.text_generation(COUNTING, max_new_tokens=8, stream=True, details=True)
    assert "".join(event.token.text for event in streamed) == COUNTED
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat_completion(messages, max_tokens=30, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    chunks = list(client.chat_completion(messages, max_tokens=30, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    endpoint = InferenceClient(url, provider="hf-inference")
    assert endpoint.get_endpoint_info()["router"] == "tightrope"
    assert endpoint.health_check()


def test_langchain_invokes_streams_and_counts(langchain_model: ChatOpenAI) -> None:
    answer = langchain_model.invoke(QUESTION, max_tokens=30, top_p=1.0, extra_body={"top_k": -1})
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    pieces = list(langchain_model.stream(QUESTION, max_tokens=30, stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == ANSWER
    assert sum((piece.usage_metadata or {"output_tokens": 0})["output_tokens"] for piece in pieces) > 0


async def test_langchain_answers_asynchronously(langchain_model: ChatOpenAI) -> None:
    answer = await langchain_model.ainvoke(QUESTION, max_tokens=30)
    assert answer.content == ANSWER
