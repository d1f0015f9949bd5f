"""What a chat's tools come to: what the template is shown, how calls are written, and whether one is forced.

A call is written as the model was trained to, which its chat template tells. A forced call is written by a grammar made
of the function's JSON schema; with tool_choice "auto" the model writes freely, and what it writes is looked through for
calls.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.json_schema import malformed, schema_fault
from tightrope.engine.guided.loosening import loosened, without_nulls
from tightrope.engine.types import Grammar
from tightrope.server.chats.offers import Offer
from tightrope.server.chats.requests import Function, Tool
from tightrope.server.fields.names import Bent
from tightrope.server.replies.calls.form import ANY, CallForm, Functions
from tightrope.server.replies.lark import Spelling

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_./:-]{1,128}")  # Gateways join names with dots and slashes.


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that a chat may call."""

    shown: list[dict[str, Any]]  # The template gets the request's own JSON.
    functions: Functions
    forced: Functions  # One of these must be called; where there are none, the model is free.
    strict: frozenset[str]  # Calls of these that the model decides on are valid.
    one_call: bool  # An answer holds one call at most.
    custom: frozenset[str] = frozenset()  # These are called with a text.

    @property
    def is_forced(self) -> bool:
        return bool(self.forced)

    @property
    def needs_grammar(self) -> bool:
        return bool(self.forced or self.strict)

    def grammar(self, form: CallForm, spelling: Spelling) -> Grammar | None:
        """That of a forced call, or of free text in which calls of strict functions are valid.

        Raises InvalidRequest for a schema that can't be enforced in this form.
        """
        if self.is_forced:
            return Grammar("lark", form.forced(self.forced, spelling, one_call=self.one_call), "tools")
        if self.strict:
            held = {name: schema if name in self.strict else ANY for name, schema in self.functions.items()}
            return Grammar("lark", form.free(held, spelling, one_call=self.one_call), "tools")
        return None

    def stops(self, form: CallForm) -> tuple[str, ...]:
        """What ends an answer that may hold one call."""
        return (form.stop,) if self.one_call and form.stop and not self.is_forced else ()


def check_tools(offer: Offer) -> None:
    """Raises InvalidRequest with the place of what is wrong with the tools."""
    functions = [tool.function for tool in offer.tools]
    if len(functions) > MAX_TOOLS:
        raise InvalidRequest(f"tools: at most {MAX_TOOLS} tools, not {len(functions)}", "tools")
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"tools: the name {twice!r} stands for two functions", "tools")
    forced = _forced(offer)
    for index, function in enumerate(functions):
        _check_function(function, f"tools[{index}].function", is_enforced=function in forced or function.strict is True)


def bent_tools(tools: Sequence[Tool]) -> list[Bent]:
    """What of tools was taken for what it plainly means."""
    return [(f"tools[{index}]", "taken as a function") for index, tool in enumerate(tools) if tool.is_bent]


def _check_function(function: Function, place: str, *, is_enforced: bool) -> None:
    if not _NAME.fullmatch(function.name):
        raise InvalidRequest(
            f"{place}.name must be 1 to 128 letters, digits and characters of _-./:, not {function.name!r:.80}",
            f"{place}.name",
        )
    schema = enforced_schema(function) if is_enforced else _schema(function)
    fault = schema_fault(schema) if is_enforced else malformed(schema)
    if fault is None and schema.get("type", "object") != "object":
        fault = f'the type of all parameters together is "object", not {schema["type"]!r:.40}'
    if fault is not None:
        raise InvalidRequest(f"{place}.parameters: {fault}", f"{place}.parameters")


def _schema(function: Function) -> dict[str, Any]:
    """The schema of a function's parameters; what is null in it is absent."""
    schema: dict[str, Any] = without_nulls(function.parameters or {})
    return schema


def enforced_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's parameters, without what can't be enforced of it where its `strict` is false."""
    schema = _schema(function)
    return loosened(schema)[0] if function.strict is False and malformed(schema) is None else schema


def _forced(offer: Offer) -> list[Function]:
    """The functions of which one must be called."""
    if offer.choice != "required":
        return []
    return [tool.function for tool in offer.tools if offer.named in (None, tool.function.name)]


def tool_use(offer: Offer) -> ToolUse | None:
    """The tools of a checked request; None where none may be called."""
    if not offer.may_call:
        return None
    functions = [tool.function for tool in offer.tools]
    forced = {function.name: enforced_schema(function) for function in _forced(offer)}
    return ToolUse(
        shown=[_shown(tool) for tool in offer.tools],
        functions={function.name: _schema(function) for function in functions},
        forced=forced,
        strict=frozenset(function.name for function in functions if function.strict and not forced),
        one_call=offer.named is not None or not offer.parallel_calls,
        custom=frozenset(tool.function.name for tool in offer.tools if tool.type == "custom"),
    )


def _shown(tool: Tool) -> dict[str, Any]:
    """As it came, with the type that templates know."""
    return {"type": "function", **tool.given} | {"type": "function"}
