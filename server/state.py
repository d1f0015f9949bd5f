"""What every route works with."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from hashlib import sha256

from fastapi import Request
from msgspec.structs import replace

from tightrope.engine.errors import EngineUnavailable
from tightrope.engine.protocol import Engine
from tightrope.engine.types import Delta, GenerateRequest, ModelInfo, TurnMarks
from tightrope.server.deltas.aborts import Aborts
from tightrope.server.deltas.side_by_side import Generate
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.http.guards import owner_of
from tightrope.server.http.kept_streams import KeptStreams
from tightrope.server.http.metrics import Metrics
from tightrope.server.http.queue_guard import hand_over
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate, Probed
from tightrope.server.prompts.turn_marks import find_turn_marks
from tightrope.server.served import Served
from tightrope.server.settings.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class AppState:
    """The engine and the settings, and what is made of them once."""

    engine: Engine
    settings: ServerSettings
    metrics: Metrics
    renderer: TemplateRenderer = field(default_factory=TemplateRenderer)
    probed: Probed = field(default_factory=dict)  # The templates of every start of the engine share it.
    aborts: Aborts = field(default_factory=Aborts)
    streams: KeptStreams = field(init=False)  # Clients may come back to these.
    started: int = field(default_factory=lambda: int(time.time()))  # It is in seconds since 1970.

    def __post_init__(self) -> None:
        settings = self.settings
        streams = KeptStreams(settings.kept_streams_mib << 20, settings.keep_streams_s)
        object.__setattr__(self, "streams", streams)  # The only way in a frozen dataclass.

    def owner(self, request: Request) -> bytes:
        """The key that a request was let in by, or brought where none is asked for."""
        return owner_of(request.scope, self.settings.api_key, self.settings.admin_key)

    def info(self) -> ModelInfo:
        """The loaded model. Raises EngineUnavailable before its first start, and while there is none."""
        info = self.engine.info
        if info is None:
            raise EngineUnavailable("the model is still loading")
        return info

    def served(self) -> Served:
        """What requests are checked against. Raises EngineUnavailable."""
        info, settings = self.info(), self.settings
        model_id = settings.served_model_name or info.model_id
        return Served(
            model_id,
            info,
            settings.engine.limits,
            settings.max_client_batch_size,
            self.engine.adapters,
            settings.any_model_name,
        )

    async def turn_marks(self, info: ModelInfo) -> TurnMarks:
        """What the chat template in use makes special of the vocabulary of a model that was just loaded."""
        return await find_turn_marks(self.renderer, self._template_of(info), info)

    async def template_notes(self) -> tuple[str, ...]:
        """What to say of the template. Raises TemplateFailed if it, which may come from anywhere, reaches too far."""
        template = self.template()
        try:
            for source in template.sources:
                await self.renderer.check(source)
            return await template.notes(self.renderer)
        except TemplateFailed as error:
            raise TemplateFailed(f"{error.message}; choose another with --chat-template") from None

    def generate_for(self, request: Request) -> Generate:
        """What runs the engine's requests that one HTTP request asks for.

        They share cached tokens with those that came with the same key and salt alone: an answer tells how many were
        found, and so whether somebody has sent the same text before.
        """
        owner = self.owner(request)

        def generate(asked: GenerateRequest) -> AsyncGenerator[Delta, None]:
            hand_over(request.scope)
            return self.metrics.generate(replace(asked, namespace=_namespace(owner, asked.namespace)))

        return generate

    def template(self) -> ChatTemplate:
        """The chat template in use. Raises EngineUnavailable."""
        return self._template_of(self.info())

    def _template_of(self, info: ModelInfo) -> ChatTemplate:
        return ChatTemplate(info, self.settings.chat_template, self.settings.chat_template_args, self.probed)


def _namespace(owner: bytes, salt: str) -> str:
    """The empty text where there is neither key nor salt; else a hash, in which neither can pass for the other."""
    if not owner and not salt:
        return ""
    return sha256(b"%d:%b%b" % (len(owner), owner, salt.encode())).hexdigest()
