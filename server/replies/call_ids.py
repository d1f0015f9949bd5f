"""Ids of calls: what a model's template takes."""

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from string import ascii_letters, digits
from typing import Any
from uuid import uuid4

CallId = Callable[[str, int], str]  # Of the function's name, and of the call's place in the answer.

_NINE = re.compile(r"\|\s*length\s*(?:!=|==)\s*9\b")
_CHARACTERS = ascii_letters + digits


def long_id(name: str, index: int) -> str:
    """OpenAI's form."""
    return f"call_{uuid4().hex[:24]}"


def short_id(name: str, index: int) -> str:
    """Mistral's form: nine letters and digits."""
    return _nine(uuid4().hex)


def numbered_id(name: str, index: int) -> str:
    """Kimi's form, which its model has learnt."""
    return f"functions.{name}:{index}"


def wants_short_ids(template: str) -> bool:
    """Whether a template refuses ids that haven't nine characters."""
    return _NINE.search(template) is not None


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with ids of nine letters and digits; the same id becomes the same."""
    return [_with_short_ids(message) for message in messages]


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(message)
    if isinstance(made.get("tool_call_id"), str):
        made["tool_call_id"] = _short(made["tool_call_id"])
    if made.get("tool_calls"):
        made["tool_calls"] = [{**call, "id": _short(call.get("id") or "")} for call in made["tool_calls"]]
    return made


def _short(call_id: str) -> str:
    is_short = len(call_id) == 9 and set(call_id) <= set(_CHARACTERS)
    return call_id if is_short else _nine(sha256(call_id.encode("utf-8", "replace")).hexdigest())


def _nine(hexadecimal: str) -> str:
    number = int(hexadecimal, 16)
    return "".join(_CHARACTERS[number // len(_CHARACTERS) ** place % len(_CHARACTERS)] for place in range(9))
