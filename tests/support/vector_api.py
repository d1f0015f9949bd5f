"""The application of fake_api with embedding models beside it, which are real and run in a thread."""

import socket
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import gguf
import httpx
from fake_api import application
from fastapi import FastAPI
from vector_models import bert, write_folder, write_gguf

from tightrope.backends.embedding.opening import open_embedders
from tightrope.backends.embedding.protocol import Embedder
from tightrope.backends.settings import EmbeddingSettings, ModelSettings
from tightrope.engine.embedding.child import serve
from tightrope.engine.process.launch import Launcher, ThreadHandle

PROMPTS = {"query": "then ", "document": ""}


@cache
def models_folder() -> Path:
    """A folder of this process' own with the models below."""
    folder = Path(mkdtemp(prefix="tightrope-vectors-"))
    write_folder(folder / "folder", bert(), prompts=PROMPTS)
    write_gguf(folder / "file.gguf", bert(), gguf.PoolingType.MEAN)
    write_folder(folder / "ranker", bert(num_labels=1), pooling=None)
    return folder


def model(name: str) -> str:
    """The path of "folder" or "file.gguf", which embed alike, or "ranker"."""
    return str(models_folder() / name)


def in_a_thread(open_models: Callable[[ModelSettings], Sequence[Embedder]] = open_embedders) -> Launcher:
    def launch(sock: socket.socket) -> ThreadHandle:
        arguments = (sock.dup(), lambda status: None, open_models)
        thread = threading.Thread(target=serve, args=arguments, name="embedder", daemon=True)
        thread.start()
        return ThreadHandle(thread)

    return launch


def embedding(*names: str, max_tokens: int = 2048) -> EmbeddingSettings:
    """The settings for some of these models."""
    return EmbeddingSettings(models=tuple(map(model, names)), max_tokens=max_tokens)


@asynccontextmanager
async def vector_api(
    *names: str, max_tokens: int = 2048, **settings: object
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """An HTTP client of a server with these models beside a chat model made of rules."""
    beside = {"embedding": embedding(*names, max_tokens=max_tokens), "launch_embedder": in_a_thread()}
    async with application(**beside, **settings) as app, http_of(app) as http:
        yield http


def http_of(app: FastAPI) -> httpx.AsyncClient:
    """Without a socket between them."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)
