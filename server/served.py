"""What requests are checked against: the served model, its limits, and the names that mean it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tightrope.engine.errors import InvalidRequest, ModelNotFound
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import ModelInfo

ANY_MODEL = frozenset({None, "", "tgi", "dummy"})  # what clients send who don't know the name
LATEST = ":latest"  # the tag that Ollama's clients put behind a name without one


@dataclass(frozen=True, slots=True)
class Served:
    """What requests are checked against."""

    model_id: str  # the name that clients see
    info: ModelInfo
    limits: LimitSettings
    max_prompts: int  # in one completion request
    adapters: Mapping[str, str] = field(default_factory=dict)  # paths of those that may be named as the model


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
