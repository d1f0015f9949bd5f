"""What the API page says of errors: their shapes, and which statuses a route may answer with, one table a column."""

from typing import Any

from pydantic import BaseModel

Documented = dict[int | str, dict[str, Any]]  # FastAPI wants a route's answers by status for its API page.


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error on /v1."""

    error: ErrorDetail


class ErrorText(BaseModel):
    """An error of the TGI routes."""

    error: str
    error_type: str


ERRORS: Documented = {
    400: {"model": ErrorAnswer, "description": "A field is missing, mistyped, out of range or can't be honoured."},
    401: {"model": ErrorAnswer, "description": "The key is missing or wrong."},
    404: {"model": ErrorAnswer, "description": "The model does not exist."},
    413: {"model": ErrorAnswer, "description": "The body is too long."},
    415: {"model": ErrorAnswer, "description": "The body is not declared as JSON."},
    429: {"model": ErrorAnswer, "description": "Too many requests wait; try again after Retry-After seconds."},
    500: {"model": ErrorAnswer, "description": "The model failed."},
    503: {"model": ErrorAnswer, "description": "The engine is loading or restarting."},
    "default": {"model": ErrorAnswer, "description": "Any other error."},
}
PLAIN = {"text/plain": {"schema": {"type": "string"}}}
TGI_ERRORS: Documented = {
    400: {"content": PLAIN, "description": "The body is no JSON."},
    401: {"description": "The key is missing or wrong; the body is empty."},
    413: {"content": PLAIN, "description": "The body is too long."},
    415: {"content": PLAIN, "description": "The body is not declared as JSON."},
    422: {
        "model": ErrorText,
        "content": PLAIN,
        "description": "A parameter is out of range (JSON), or of another type (plain text).",
    },
    424: {"model": ErrorText, "description": "The model failed, is loading or restarting."},
    429: {"model": ErrorText, "description": "Too many requests wait; try again after Retry-After seconds."},
    503: {"model": ErrorText, "description": "The server is shutting down; another may be here after Retry-After."},
}


def only(*statuses: int | str) -> Documented:
    """The rows of these statuses."""
    return {status: ERRORS[status] for status in statuses}


def written(errors: Documented = ERRORS, **reply: object) -> dict[str, Any]:
    """FastAPI's settings for a route that writes an answer, with what its page says of one that succeeds."""
    return {"response_model": None, "responses": {**errors, 200: reply}}


STATUS_ERRORS = only(401, 503)  # Routes that tell of the model have these.
MODEL_ERRORS = only(401, 404, 503, "default")  # Those that tell of a model that may be named have these.
CALL_ERRORS = only(400, 401, 413, 415, 503, "default")  # Routes that take a body and write no answer have these.
