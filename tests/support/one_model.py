"""What routes work with where one engine is all there is."""

from collections.abc import Mapping

from tightrope.engine.embedding.client import EmbeddingClient
from tightrope.engine.protocol import Engine
from tightrope.engine.settings import EngineSettings
from tightrope.server.models.models import Models
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.settings.settings import ServerSettings
from tightrope.server.state import AppState, front_of


def front_of_one(engine: Engine, settings: ServerSettings, renderer: TemplateRenderer | None = None) -> AppState:
    return front_of(Models.alone(engine, settings, no_other), settings, EmbeddingClient(settings.engine), renderer)


def no_other(settings: EngineSettings, adapters: Mapping[str, str] | None) -> Engine:
    """The engine is never unloaded."""
    raise AssertionError("no other engine is to be made")
