"""Errors that cross the process border by their code and reach a client in its API's own shape."""

from typing import ClassVar, Self


class EngineError(Exception):
    """Base of everything the engine reports. `code` is stable; `param` names the field at fault, where one is.

    `retry_after_s` is there for what passes by itself.
    """

    code: ClassVar[str] = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    def details(self) -> dict[str, int]:
        """Numbers that a server may want to word in its own way."""
        return {}

    @classmethod
    def rebuild(cls, message: str, param: str | None, details: dict[str, int]) -> Self:
        """Make the error again on the other side of the process border."""
        return cls(message, param)


class InvalidRequest(EngineError):
    """The request can't be served as it is; the client has to change it."""

    code = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and tokens asked for don't fit the window, or the prompt is longer than prompts may be."""

    code = "context_length_exceeded"

    def __init__(
        self,
        prompt_tokens: int,
        new_tokens: int,
        max_model_len: int,
        param: str | None = "prompt",
        *,
        is_least: bool = False,
        max_input_tokens: int = 0,
    ) -> None:
        """is_least: the prompt was not read to its end, and has so many tokens at least.

        max_input_tokens: the bound of prompts that this one exceeds; 0 where the window alone is too small.
        """
        least = "at least " if is_least else ""
        window = (
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{least}{prompt_tokens + new_tokens} tokens ({least}{prompt_tokens} in the prompt, {new_tokens} to "
            "generate)."
        )
        bound = f"This server takes prompts of up to {max_input_tokens} tokens. However, yours has {prompt_tokens}."
        super().__init__(bound if max_input_tokens else window, param)
        self.is_least = is_least
        self.max_input_tokens = max_input_tokens
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.max_model_len = max_model_len

    def details(self) -> dict[str, int]:
        sizes = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "max_model_len": self.max_model_len,
        }
        others = {"is_least": int(self.is_least), "max_input_tokens": self.max_input_tokens}
        return sizes | {name: value for name, value in others.items() if value}

    @classmethod
    def rebuild(cls, message: str, param: str | None, details: dict[str, int]) -> Self:
        return cls(
            details["prompt_tokens"],
            details["new_tokens"],
            details["max_model_len"],
            param,
            is_least="is_least" in details,
            max_input_tokens=details.get("max_input_tokens", 0),
        )


class ModelNotFound(EngineError):
    """The request names a model or adapter that isn't served."""

    code = "model_not_found"


class Overloaded(EngineError):
    """As many requests wait as may wait."""

    code = "rate_limit_exceeded"
    retry_after_s = 2


class EngineUnavailable(EngineError):
    """The engine process is loading, restarting or gone."""

    code = "engine_unavailable"
    retry_after_s = 2


class BackendFailed(EngineError):
    """The model failed while it ran."""

    code = "server_error"


_BY_CODE: dict[str, type[EngineError]] = {
    cls.code: cls
    for cls in (InvalidRequest, ContextLengthExceeded, ModelNotFound, Overloaded, EngineUnavailable, BackendFailed)
}


def rebuild_error(code: str, message: str, param: str | None, details: dict[str, int]) -> EngineError:
    """The exception that `code` stands for, as it was on the other side of the process border."""
    return _BY_CODE.get(code, BackendFailed).rebuild(message, param, details)
