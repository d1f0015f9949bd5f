"""What every route works with."""

import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Self

from fastapi import Request
from msgspec.structs import replace

from tightrope.backends.embedding.card import EmbedderCard
from tightrope.engine.embedding.protocol import EmbeddingEngine
from tightrope.engine.errors import BackendFailed, EngineUnavailable, InvalidRequest
from tightrope.engine.protocol import Engine
from tightrope.engine.types import Delta, GenerateRequest, ModelInfo, TurnMarks
from tightrope.server.deltas.aborts import Aborts
from tightrope.server.deltas.side_by_side import Generate
from tightrope.server.http.guards import owner_of
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.holds import release_at_end
from tightrope.server.http.kept_streams import KeptStreams
from tightrope.server.http.metrics import Metrics
from tightrope.server.http.queue_guard import hand_over
from tightrope.server.http.resuming import session_of
from tightrope.server.models.model import Model
from tightrope.server.models.models import Models
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate, Probed
from tightrope.server.prompts.turn_marks import checked_turn_marks, choosable
from tightrope.server.served import LATEST, Names, Served
from tightrope.server.settings.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class AppState:
    """The models and the settings, and what is made of them once."""

    models: Models
    settings: ServerSettings  # The server's; where it speaks of one model, with that one's own.
    metrics: Metrics
    streams: KeptStreams  # Clients may come back to these.
    embedder: EmbeddingEngine
    renderer: TemplateRenderer = field(default_factory=TemplateRenderer)
    probed: Probed = field(default_factory=dict)  # The templates of every start of an engine share it.
    aborts: Aborts = field(default_factory=Aborts)
    started: int = field(default_factory=lambda: int(time.time()))  # It is in seconds since 1970.
    chosen: Model | None = None  # It speaks of this one; None: whichever is the current one.

    @property
    def model(self) -> Model:
        """The one that it speaks of."""
        return self.chosen or self.models.current

    @property
    def engine(self) -> Engine:
        return self.model.engine

    def of(self, model: Model) -> Self:
        """The same, speaking of this model."""
        return dataclasses.replace(self, chosen=model, settings=model.settings)

    async def at(self, request: Request, name: str | None) -> Self:
        """The same, speaking of the model of this name, which is loaded and stays so until the request has ended.

        It may be long in coming. Raises what Models.hold raises, ClientGone, and InvalidRequest for one that writes no
        text.
        """
        if (beside := self.embedder_of(name)) is not None:
            does = "makes vectors of texts, on /v1/embeddings" if beside.kind == "embedding" else "ranks, on /v1/rerank"
            raise InvalidRequest(f"{beside.model_id} writes no text: it {does}", "model")
        model = self.models.find(name)
        if self.models.is_ready(model):
            model.take()
        else:
            model = await or_gone(request, self.models.hold(name))
        release_at_end(request.scope, model.release)
        return self.of(model)

    def embedder_of(self, name: str | None) -> EmbedderCard | None:
        """The embedding or reranking model of this name, where no chat model has it."""
        meant = {name, (name or "").removesuffix(LATEST)}
        if meant & {model.name for model in self.models.all}:
            return None
        return next((card for card in self.embedder.cards if card.model_id in meant), None)

    async def start_engines(self) -> None:
        """Load the embedding models, and then the chat model, which is planned for with those in place.

        Several are loaded when they are asked for.
        """
        await self.embedder.start()
        if self.models.is_alone:
            with suppress(BackendFailed):  # Who announces the server tells of it, and ends it.
                await self.embedder.wait_ready()
        await self.models.start(lambda model: self.of(model).turn_marks)

    def owner(self, request: Request) -> bytes:
        """The key that a request was let in by, or brought where none is asked for."""
        return owner_of(request.scope, self.settings.api_key, self.settings.admin_key)

    def info(self) -> ModelInfo:
        """What is known of the model since it was loaded last. Raises EngineUnavailable before that."""
        if (info := self.model.info) is None:
            what = "the model is still loading" if self.models.is_alone else "no model is loaded; name one in a request"
            raise EngineUnavailable(what)
        return info

    def served(self) -> Served:
        """What requests are checked against. Raises EngineUnavailable."""
        info, settings = self.info(), self.model.settings
        return Served(
            self.model.name,
            info,
            settings.engine.limits,
            settings.max_client_batch_size,
            self.engine.adapters,
            settings.any_model_name,
        )

    def names(self) -> Names:
        """What requests may call the model, whether it is loaded or not."""
        return Names(self.model.name, self.model.adapters, self.settings.any_model_name)

    async def turn_marks(self, info: ModelInfo) -> TurnMarks:
        """What the chat template in use makes special of the vocabulary of a model that was just loaded.

        Raises TemplateFailed if the template, which may come from anywhere, reaches too far.
        """
        return await checked_turn_marks(self.renderer, self.template_of(info), info)

    async def template_notes(self) -> tuple[str, ...]:
        """What to say of the template. Raises TemplateFailed if it had to be stopped."""
        with choosable():
            return await self.template().notes(self.renderer)

    def generate_for(self, request: Request) -> Generate:
        """What runs the engine's requests that one HTTP request asks for.

        They share cached tokens with those that came with the same key and salt alone: an answer tells how many were
        found, and so whether somebody has sent the same text before. Raises InvalidRequest.
        """
        owner, session = self.owner(request), session_of(request)

        def generate(asked: GenerateRequest) -> AsyncGenerator[Delta, None]:
            hand_over(request.scope)
            namespace = _namespace(owner, asked.namespace)
            return self.metrics.generate(self.engine, replace(asked, namespace=namespace, session=session))

        return generate

    def template(self) -> ChatTemplate:
        """The chat template in use. Raises EngineUnavailable."""
        return self.template_of(self.info())

    def template_of(self, info: ModelInfo) -> ChatTemplate:
        """The same of a model that need not be loaded any more."""
        settings = self.model.settings
        return ChatTemplate(info, settings.chat_template, settings.chat_template_args, self.probed)


def front_of(
    models: Models, settings: ServerSettings, embedder: EmbeddingEngine, renderer: TemplateRenderer | None = None
) -> AppState:
    """That of a server before its start."""
    streams = KeptStreams(settings.kept_streams_mib << 20, settings.keep_streams_s)
    return AppState(models, settings, Metrics(models, embedder), streams, embedder, renderer or TemplateRenderer())


def _namespace(owner: bytes, salt: str) -> str:
    """The empty text where there is neither key nor salt; else a hash, in which neither can pass for the other."""
    if not owner and not salt:
        return ""
    return sha256(b"%d:%b%b" % (len(owner), owner, salt.encode())).hexdigest()
