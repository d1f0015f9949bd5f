"""The whole HTTP face over a model made of rules, in this process: app, client and engine core are the real ones."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import fastapi.routing
import httpx
import msgspec
from fakes import ByteTokenizer, FakeBackend, script
from fastapi import FastAPI
from fastapi._compat import ModelField

from tightrope.backends.settings import EmbeddingSettings, ModelSettings
from tightrope.engine.embedding.client import EmbeddingClient, spawn_embedder
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import Launcher, thread_launcher
from tightrope.engine.settings import EngineSettings, LimitSettings
from tightrope.server.app import create_app
from tightrope.server.http.draining import Drain
from tightrope.server.models.models import Models
from tightrope.server.settings.settings import ServerSettings
from tightrope.server.state import front_of

NextToken = Callable[[Sequence[int]], int]
_create_field = fastapi.routing.create_model_field


@cache
def _field(type_: object, mode: Literal["validation", "serialization"]) -> ModelField:
    return _create_field("", type_, mode=mode)


def _named_field(name: str, type_: object, mode: Literal["validation", "serialization"] = "validation") -> ModelField:
    """A field of what a route answers; what pydantic makes of its type is made once."""
    field = copy(_field(type_, mode))
    field.name = name
    return field


# An application has 600 such fields of 40 types, four fifths of its start, and hundreds of tests have one each.
fastapi.routing.create_model_field = _named_field


@asynccontextmanager
async def application(
    answer: str | NextToken = "fine",
    *,
    chat_template: str | None = None,
    chat_templates: Mapping[str, str] = MappingProxyType({}),
    limits: Mapping[str, int] = MappingProxyType({}),
    clock: Callable[[], float] = time.monotonic,
    drain: Drain | None = None,
    max_model_len: int = 1024,
    added: Sequence[str] = (),
    special: Sequence[str] = (),
    embedding: EmbeddingSettings = EmbeddingSettings(),  # noqa: B008  # It never changes.
    launch_embedder: Launcher = spawn_embedder,
    is_awaited: bool = True,
    **settings: object,
) -> AsyncGenerator[FastAPI, None]:
    """The server's application, started, with a model that answers prompts that end in "?" with `answer`.

    is_awaited: the models are loaded.
    """
    model = ModelSettings(embedding=embedding, threads=1)
    engine = EngineSettings(model=model, limits=LimitSettings.model_validate(limits))
    chosen = ServerSettings.model_validate({"engine": engine, **settings})
    tokenizer = ByteTokenizer(added, special)
    said = tokenizer.encode(answer, parse_special=True, is_start=False) if isinstance(answer, str) else ()
    next_token = script(said) if isinstance(answer, str) else answer
    backend = FakeBackend(next_token, max_model_len=max_model_len, added=added, special=special)
    backend.card = replace(backend.card, chat_template=chat_template, chat_templates=tuple(chat_templates.items()))
    launch = thread_launcher(lambda settings, progress: backend)

    def next_client(settings: EngineSettings, adapters: Mapping[str, str] | None) -> EngineClient:
        return EngineClient(settings, launch, clock, adapters=adapters)

    client = next_client(chosen.engine, None)
    models = Models.alone(client, chosen, next_client)
    embedder = EmbeddingClient(chosen.engine, lambda: models.is_writing, launch_embedder)
    front = front_of(models, chosen, embedder)
    app = create_app(front, drain)
    async with app.router.lifespan_context(app):
        if is_awaited:
            await front.embedder.wait_ready()
            await client.wait_ready()
        yield app


@asynccontextmanager
async def api(
    answer: str | NextToken = "fine",
    *,
    chat_template: str | None = None,
    limits: Mapping[str, int] = MappingProxyType({}),
    clock: Callable[[], float] = time.monotonic,
    drain: Drain | None = None,
    **settings: object,
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """An HTTP client of that application, without a socket between them."""
    async with application(
        answer, chat_template=chat_template, limits=limits, clock=clock, drain=drain, **settings
    ) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield http


def events(body: str) -> list[Any]:
    """The JSON of all events of a stream; its end mark stays a string."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]
