"""What requests are checked against: the served model, its limits, and the names that mean it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tightrope.engine.errors import InvalidRequest, ModelNotFound
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import ModelInfo
from tightrope.server.http.body import log_ignored

ANY_MODEL = frozenset({None, "", "tgi", "dummy"})  # Clients that don't know the name send these.
LATEST = ":latest"  # Ollama's clients put this tag behind a name without one.


class Named(Protocol):
    """What a request's `model` is checked against."""

    @property
    def model_id(self) -> str: ...

    @property
    def adapters(self) -> Mapping[str, str]: ...

    @property
    def any_name(self) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Names:
    """The same of a model that need not be loaded."""

    model_id: str
    adapters: Mapping[str, str]
    any_name: bool | None


@dataclass(frozen=True, slots=True)
class Served:
    """What requests are checked against."""

    model_id: str  # Clients see this name.
    info: ModelInfo
    limits: LimitSettings
    max_prompts: int  # One completion request may have so many.
    adapters: Mapping[str, str] = field(default_factory=dict)  # They may be named as the model; each has its path.
    any_name: bool | None = None  # Whether any name means the model; None: on all routes but OpenAI's.


def means_the_model(name: str | None, model_id: str) -> bool:
    """Whether a request's `model` is the served one, and no adapter."""
    return name in ANY_MODEL or name == model_id


def is_named(name: str | None, served: Named) -> bool:
    """Whether a request's `model` is the served one, an adapter, or a name for "whatever is there"."""
    meant = None if name is None else name.removesuffix(LATEST)
    return any(means_the_model(n, served.model_id) or n in served.adapters for n in (name, meant))


def check_model(name: str | None, served: Named, *, is_openai: bool = False) -> str | None:
    """The adapter that `name` means; None for the served model.

    Raises ModelNotFound for a name of neither, where not all of them mean the model; see `takes_any_name`.
    """
    if not is_named(name, served) and not takes_any_name(served, is_openai=is_openai):
        raise ModelNotFound(f"The model `{name}` does not exist.", "model")
    for meant in (name, (name or "").removesuffix(LATEST)):
        if means_the_model(meant, served.model_id):
            return None
        if meant in served.adapters:
            return meant
    log_ignored(f"model={name!r:.80}", lambda: ["model"])
    return None


def takes_any_name(served: Named, *, is_openai: bool) -> bool:
    """Whether any name means the one model that is served: many clients send a name of their own.

    is_openai: on the routes of OpenAI, whose clients choose among models by their names.
    """
    return not is_openai if served.any_name is None else served.any_name


def check_most(name: str, value: int | None, most: int) -> None:
    """Raises InvalidRequest for a value above the server's limit."""
    if value is not None and value > most:
        raise InvalidRequest(f"{name} must be at most {most}, not {value}", name)
