"""Pydantic AI over chats, responses and messages: texts, streams, tools and objects."""

import asyncio
import json
import os
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

URL = os.environ["URL"]
QUESTION = "Repeat after me: Hello, Mary!"
SETTINGS = {"temperature": 0, "max_tokens": 60}


class Person(BaseModel):
    """Somebody."""

    name: Literal["Mary", "Tom"]


async def main() -> None:
    openai = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    models = {
        "chat": OpenAIChatModel("tgi", provider=openai),
        "responses": OpenAIResponsesModel("tgi", provider=openai),
        "messages": AnthropicModel("claude-3-haiku-20240307", provider=AnthropicProvider(api_key="none", base_url=URL)),
    }
    for name, model in models.items():
        agent = Agent(model, model_settings=SETTINGS, retries=0)
        whole = await agent.run(QUESTION)
        async with agent.run_stream(QUESTION) as stream:
            streamed = "".join([piece async for piece in stream.stream_text(delta=True)])
        by_tool = await Agent(model, output_type=Person, model_settings=SETTINGS, retries=0).run("Who is Mary?")
        told = {"text": whole.output, "streamed": streamed, "by_tool": by_tool.output.model_dump()}
        if name != "messages":
            shaped = Agent(model, output_type=NativeOutput(Person), model_settings=SETTINGS, retries=0)
            told["shaped"] = (await shaped.run("Who is Mary?")).output.model_dump()
        sys.stdout.write(json.dumps({name: told}) + "\n")


asyncio.run(main())
