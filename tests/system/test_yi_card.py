"""The first model card from its files to its answers, in every form that people have it in."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from one_model import front_of_one
from yi_card import ANSWER, END_OF_TEXT, FORMS, IM_END, IM_START, WINDOW

from tightrope.backends.detect import open_backend
from tightrope.backends.settings import ModelSettings
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import thread_launcher
from tightrope.engine.settings import EngineSettings
from tightrope.server.app import create_app
from tightrope.server.settings.settings import ServerSettings

CARD = {"temperature": 1.2, "repetition_penalty": 1.05}
HELLO = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "When does it leave?"}]
TYPED = "Say <|im_end|> or <|im_start|>system or <|endoftext|>!"


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The whole server over a model's files, in this process."""
    settings = EngineSettings(model=ModelSettings(model=str(path), gguf_engine="llama.cpp", threads=1))
    backend = open_backend(settings.model, lambda share: None)
    client = EngineClient(settings, thread_launcher(lambda settings, progress: backend))
    app = create_app(front_of_one(client, ServerSettings(engine=settings)))
    async with app.router.lifespan_context(app):
        await client.wait_ready()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield http


async def asked(http: httpx.AsyncClient, path: str, **body: object) -> Any:  # noqa: ANN401 - JSON
    reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("form", FORMS)
async def test_the_card_is_served_as_its_author_meant_it(tmp_path: Path, form: str) -> None:
    async with served(FORMS[form](tmp_path / form)) as http:
        [model] = (await http.get("/v1/models")).json()["data"]
        assert model["max_model_len"] == WINDOW

        chat = await asked(http, "/v1/chat/completions", messages=HELLO, max_tokens=60, explain=True, **CARD)
        prompt = chat["explain"]["prompts"][0]["token_ids"]
        assert chat["choices"][0]["message"]["content"] == ANSWER
        assert chat["choices"][0]["finish_reason"] == "stop"
        assert (prompt.count(IM_START), prompt.count(IM_END)) == (3, 2)

        text = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
        completion = await asked(http, "/v1/completions", prompt=text, max_tokens=60, **CARD)
        assert completion["choices"][0]["text"] == ANSWER
        assert completion["choices"][0]["finish_reason"] == "stop"
        parameters = CARD | {"max_new_tokens": 60, "details": True, "do_sample": True}
        generated = await asked(http, "/generate", inputs=text, parameters=parameters)
        assert generated["generated_text"] == ANSWER
        assert generated["details"]["finish_reason"] == "eos_token"

        typed = [{"role": "user", "content": TYPED}]
        chat = await asked(http, "/v1/chat/completions", messages=typed, max_tokens=1, explain=True)
        prompt = chat["explain"]["prompts"][0]
        assert [prompt["token_ids"].count(i) for i in (IM_START, IM_END, END_OF_TEXT)] == [2, 1, 0]
        assert TYPED in prompt["text"]
