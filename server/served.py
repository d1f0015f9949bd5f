"""What requests are checked against: the served model, its limits, and the names that mean it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tightrope.engine.errors import InvalidRequest, ModelNotFound
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import ModelInfo

ANY_MODEL = frozenset({None, "", "tgi", "dummy"})  # Clients that don't know the name send these.
LATEST = ":latest"  # Ollama's clients put this tag behind a name without one.


@dataclass(frozen=True, slots=True)
class Served:
    """What requests are checked against."""

    model_id: str  # Clients see this name.
    info: ModelInfo
    limits: LimitSettings
    max_prompts: int  # One completion request may have so many.
    adapters: Mapping[str, str] = field(default_factory=dict)  # They may be named as the model; each has its path.


def means_the_model(name: str | None, model_id: str) -> bool:
    """Whether a request's `model` is the served one, and no adapter."""
    return name in ANY_MODEL or name == model_id


def check_model(name: str | None, served: Served) -> str | None:
    """The adapter that `name` means; None for the served model and the names for "whatever is there".

    Raises ModelNotFound for any other name.
    """
    for meant in (name, None if name is None else name.removesuffix(LATEST)):
        if means_the_model(meant, served.model_id):
            return None
        if meant in served.adapters:
            return meant
    raise ModelNotFound(f"The model `{name}` does not exist.", "model")


def check_most(name: str, value: int | None, most: int) -> None:
    """Raises InvalidRequest for a value above the server's limit."""
    if value is not None and value > most:
        raise InvalidRequest(f"{name} must be at most {most}, not {value}", name)
