"""JSON files of a model folder, read with limits and without trust."""

import json
import math
from pathlib import Path
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import SNIFFED, told_by_start
from tightrope.backends.files.opened import read_bytes


def read_object(path: Path, max_bytes: int, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file.

    Raises BackendError when the file can't be read, is larger than `max_bytes`, is no JSON object, or, if `finite`,
    holds a NaN or an infinity anywhere, whose field is named.
    """
    raw = read_bytes(path, max_bytes)
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        told = told_by_start(raw[:SNIFFED], len(raw), is_json=True) or f"{error.msg} in line {error.lineno}"
        raise BackendError(f"{path}: not JSON: {told}") from None
    except (ValueError, RecursionError):
        raise BackendError(f"{path}: not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise BackendError(f"{path}: holds {type(value).__name__} instead of a JSON object")
    if finite:
        check_finite(path, value)
    return value


def check_finite(path: Path, value: object, field: str = "") -> None:
    """Raise BackendError, naming the field, for NaN and infinities, which Python's JSON reader accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BackendError(f"{path}: {field} is {value}; it must be a finite number")
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(path, item, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_finite(path, item, f"{field}[{i}]")
