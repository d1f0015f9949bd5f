"""Several models made of rules behind the whole HTTP face, in this process; a model answers with its own name."""

import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import httpx
from fakes import FakeBackend, script

from tightrope.backends.errors import BackendError
from tightrope.backends.settings import ModelSettings
from tightrope.engine.embedding.client import EmbeddingClient
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import thread_launcher
from tightrope.engine.process.planning import Need, Planned
from tightrope.engine.settings import EngineSettings
from tightrope.server.app import create_app
from tightrope.server.models.models import Models
from tightrope.server.models.room import Room
from tightrope.server.settings.settings import ServerSettings
from tightrope.server.state import front_of

GIB = 1 << 30
PATIENCE_S = 240.0


@dataclass(slots=True)
class Gate:
    """What waits before it waits until it is open."""

    opened: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)


@dataclass(slots=True)
class Several:
    """A running application with several models, and what its engines were told.

    broken: models that can't be loaded; unplanned: of which not even the headers can be read; loads: gates that a load
    waits before; answers: gates that the second word of an answer to "Wait?" waits before.
    """

    free_bytes: int = 64 * GIB
    needs: dict[str, int] = field(default_factory=dict)  # Bytes by a model's name; others need one GiB.
    broken: set[str] = field(default_factory=set)
    unplanned: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)  # They fit into no memory.
    loads: dict[str, Gate] = field(default_factory=dict)
    answers: dict[str, Gate] = field(default_factory=dict)
    told: dict[str, EngineSettings] = field(default_factory=dict)  # Of the engine that was started last.
    loaded: list[str] = field(default_factory=list)  # In the order of their loads.
    num_plans: int = 0
    http: httpx.AsyncClient = field(default_factory=httpx.AsyncClient)
    models: Models = field(init=False)

    def open(self, settings: ModelSettings, progress: Callable[[float], None]) -> FakeBackend:
        name = settings.model or ""
        progress(0.25)
        if name in self.loads:
            self.loads[name].wait()
        if name in self.broken:
            raise BackendError(f"/models/{name}.gguf: not a GGUF file")
        self.loaded.append(name)
        says = script(name)

        def next_token(token_ids: Sequence[int]) -> int:
            if name in self.answers and bytes(i for i in token_ids if i < 256).endswith(b"Wait?" + name[:1].encode()):
                self.answers[name].wait()
            return says(token_ids)

        return FakeBackend(next_token, max_num_seqs=settings.max_num_seqs)

    def make_engine(self, settings: EngineSettings, adapters: Mapping[str, str] | None) -> EngineClient:
        self.told[settings.model.model or ""] = settings
        return EngineClient(settings, thread_launcher(self.open), adapters=adapters)

    async def plan(self, settings: ModelSettings, host_bytes: int | None) -> Planned:
        self.num_plans += 1
        name = settings.model or ""
        if name in self.unplanned:
            return Planned(error=f"/models/{name}.gguf: not a GGUF file")
        refusal = "weights and workspace take too much" if name in self.refused and host_bytes is not None else None
        return Planned(Need(self.needs.get(name, GIB), 0), refusal)

    def states(self) -> dict[str, str]:
        return {model.name: model.state for model in self.models.all}

    async def ask(self, name: str | None, text: str = "Well?", **more: object) -> httpx.Response:
        named = {} if name is None else {"model": name}
        return await self.http.post("/v1/completions", json={"prompt": text, "max_tokens": 8, **named, **more})

    async def said(self, name: str | None, text: str = "Well?") -> str:
        reply = await self.ask(name, text)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])


@asynccontextmanager
async def several(
    *names: str,
    adapters: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    **settings: object,
) -> AsyncGenerator[Several, None]:
    """A server of models of these names. adapters: paths by name, of each model. settings: of ServerSettings."""
    running = Several()
    general = ServerSettings.model_validate({"models": "/models", **settings})

    def of(name: str) -> ServerSettings:
        model = {**general.engine.model.model_dump(), "model": name, "adapters": dict(adapters.get(name, {}))}
        engine = {**general.engine.model_dump(), "model": model}
        return ServerSettings.model_validate({**general.model_dump(), "engine": engine})

    room = Room(running.plan, lambda: running.free_bytes)
    running.models = Models.of({name: of(name) for name in names}, general, running.make_engine, room)
    app = create_app(front_of(running.models, general, EmbeddingClient(general.engine)))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        running.http = http
        yield running
