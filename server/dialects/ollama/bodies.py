"""What Ollama's clients send and get."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from tightrope.server.asking import AnswerBody
from tightrope.server.chats.requests import Message, Tool
from tightrope.server.fields import structured
from tightrope.server.fields.explain import Explained
from tightrope.server.fields.names import KNOWN, Ignored
from tightrope.server.http.body import Body, FirstErrorOnly


class OllamaOptions(Body):
    """Sampling and the answer's shape, under Ollama's or any other names."""

    read_elsewhere = KNOWN | structured.NAMES


class OllamaBody(AnswerBody):
    """What both kinds of request have in common. What `options` may hold is taken beside them, too."""

    stream: bool = Field(True, description="Lines of JSON as they come; false gives one object.")
    options: OllamaOptions = OllamaOptions()
    keep_alive: int | float | str | None = Field(
        None, description="Where there are several models: how long this one stays loaded behind the last request."
    )
    format: str | dict[str, Any] | None = Field(None, description="json or a JSON schema.")
    logprobs: bool = Field(False, description="List the log probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, description="Alternatives at each token.")
    think: bool | str | None = Field(None, description='Whether to think, or how much: "low", "medium" or "high".')

    def given(self) -> dict[str, Any]:
        shape = {} if self.format is None else {"format": self.format}
        return super().given() | shape | (self.options.model_extra or {})

    def overruled(self) -> list[Ignored]:
        """The fields that stand beside the options and say something else than they."""
        options = self.options.model_extra or {}
        beside = (self.model_extra or {}) | {"format": self.format}
        differ = [name for name in beside if options.get(name) not in (None, beside[name])]
        return [(name, "the options have it too, and count") for name in differ if beside[name] is not None]


class OllamaGenerate(OllamaBody):
    """POST /api/generate."""

    prompt: str = Field("", description="Without one the model is named as loaded.")
    system: str | None = None
    raw: bool = Field(False, description="Run the prompt as it is, without the chat template.")


class OllamaMessage(Message):
    """One turn of the chat; a tool's names the function that was called."""

    tool_name: str | None = Field(None, description="Whose result this is.")


class OllamaChat(OllamaBody):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], FirstErrorOnly()] = Field([])
    tools: list[Tool] | None = Field(None, description="Functions that the model may call.")


class ModelDetails(BaseModel):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str = ""
    quantization_level: str


class OllamaModel(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str = Field(description="Of the name: files are not hashed.")
    details: ModelDetails


class OllamaModels(BaseModel):
    models: list[OllamaModel]


class RunningModel(BaseModel):
    name: str
    model: str
    size: int
    digest: str = Field(description="Of the name: files are not hashed.")
    details: ModelDetails
    expires_at: str
    size_vram: int
    context_length: int


class RunningModels(BaseModel):
    models: list[RunningModel]


class ShowBody(Body):
    """POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="The older name of model.")


class Shown(BaseModel):
    template: str
    details: ModelDetails
    model_info: dict[str, str | int]
    capabilities: list[str] = Field(description="completion, and what the chat template knows of tools and thinking.")
    modified_at: str


class _Answer(BaseModel):
    """What the answers of both routes have, and their lines."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    logprobs: list[dict[str, Any]] = Field([], description="Absent unless asked for.")
    explain: Explained = {}


class OllamaAnswer(_Answer):
    """The answer to /api/generate, or one of its lines."""

    response: str
    thinking: str = Field("", description="Absent without thoughts.")


class CalledFunction(BaseModel):
    name: str
    arguments: dict[str, Any]


class OllamaCall(BaseModel):
    id: str
    function: CalledFunction


class OllamaSaid(BaseModel):
    role: str
    thinking: str = Field("", description="Absent without thoughts.")
    content: str
    tool_calls: list[OllamaCall] = Field([], description="Absent where nothing is called.")


class OllamaChatAnswer(_Answer):
    """The answer to /api/chat, or one of its lines."""

    message: OllamaSaid


class OllamaError(BaseModel):
    """Every error of these routes; in a stream it is the last line."""

    error: str
