"""OpenAI's Python package over the Responses API, against the application on a real port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import FunctionToolParam, ResponseInputParam
from pydantic import BaseModel
from served_app import serving

THINK = ("<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}?{# tools #}"
)
TIDE: FunctionToolParam = {
    "type": "function",
    "name": "tide",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"port": {"type": "string", "enum": ["Hull"]}},
        "required": ["port"],
        "additionalProperties": False,
    },
}


class Number(BaseModel):
    """The shape of an answer."""

    a: int


@asynccontextmanager
async def client(answer: str) -> AsyncIterator[AsyncOpenAI]:
    async with serving(answer, chat_template=TEMPLATE, special=THINK) as port:
        url = f"http://127.0.0.1:{port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as made:
            yield made


async def test_a_question_is_answered_whole_and_in_a_stream() -> None:
    async with client("<think>Hm.</think>Hello, Mary!") as api:
        whole = await api.responses.create(model="gpt-x", input="Greet", instructions="Kind.", metadata={"a": "b"})
        async with api.responses.stream(model="gpt-x", input="Greet") as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
    assert whole.output_text == final.output_text == "".join(deltas) == "Hello, Mary!"
    assert (whole.status, whole.metadata, whole.error) == ("completed", {"a": "b"}, None)
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens


async def test_a_shape_is_parsed() -> None:
    async with client('{"a": 7}') as api:
        whole = await api.responses.parse(model="gpt-x", input="A number", text_format=Number)
        async with api.responses.stream(model="gpt-x", input="A number", text_format=Number) as stream:
            final = await stream.get_final_response()
    assert whole.output_parsed == final.output_parsed == Number(a=7)


async def test_a_tool_is_called_and_its_output_goes_back_with_all_items() -> None:
    async with client('<tool_call>\n{"name": "tide", "arguments": {"port": "Hull"}}\n</tool_call>') as api:
        turns: ResponseInputParam = [{"role": "user", "content": "Tide in Hull"}]
        made = await api.responses.create(model="gpt-x", input=turns, tools=[TIDE], store=False)
        (call,) = made.output
        assert call.type == "function_call"
        assert (call.name, call.arguments) == ("tide", '{"port": "Hull"}')
        async with api.responses.stream(model="gpt-x", input=turns, tools=[TIDE]) as stream:
            names = [event.type async for event in stream]
            (streamed,) = (await stream.get_final_response()).output
        assert "response.function_call_arguments.done" in names
        assert streamed.type == "function_call"
        assert streamed.arguments == call.arguments
        turns.append(call.to_dict())  # type: ignore[arg-type]  # As the package's own examples do.
        turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "High at 9"})
        after = await api.responses.create(model="gpt-x", input=turns, tools=[TIDE], store=False)
    assert after.status == "completed"


async def test_what_is_refused_raises_with_its_field() -> None:
    async with client("fine") as api:
        with pytest.raises(openai.BadRequestError) as refused:
            await api.responses.create(model="gpt-x", input="a", previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve("resp_1")
        counted = await api.responses.input_tokens.count(model="gpt-x", input="Greet")
    assert refused.value.param == "previous_response_id"
    assert counted.input_tokens == len("[user]Greet?") + 1
