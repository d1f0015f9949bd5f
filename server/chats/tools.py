"""What a chat's tools come to: what the template is shown, how calls are written, and whether one is forced.

A call is written as the model was trained to, which its chat template tells. A forced call is written by a grammar made
of the function's JSON schema; with tool_choice "auto" the model writes freely, and what it writes is looked through for
calls.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.json_schema import malformed, schema_fault
from tightrope.engine.guided.loosening import loosened
from tightrope.engine.types import Grammar
from tightrope.server.chats.requests import Function, Tool
from tightrope.server.replies.calls.form import ANY, CallForm, Functions
from tightrope.server.replies.lark import Spelling

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_./:-]{1,128}")  # Gateways join names with dots and slashes.


class OffersTools(Protocol):
    """What is read of a body with tools."""

    @property
    def tools(self) -> list[Tool] | None: ...
    @property
    def tool_choice(self) -> str | dict[str, Any] | None: ...
    @property
    def parallel_tool_calls(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """The same for dialects whose bodies have tools in another form."""

    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True


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


def check_tools(body: OffersTools) -> None:
    """Raises InvalidRequest with the place of what is wrong with the tools, or with the choice among them."""
    functions = [tool.function for tool in body.tools or []]
    if len(functions) > MAX_TOOLS:
        raise InvalidRequest(f"tools: at most {MAX_TOOLS} tools, not {len(functions)}", "tools")
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"tools: the name {twice!r} stands for two functions", "tools")
    if body.tool_choice not in (None, "none", "auto") and not functions:
        raise InvalidRequest("tool_choice is only allowed when tools are given", "tool_choice")
    chosen = _chosen(body)
    if chosen is not None and chosen not in names:
        raise InvalidRequest(f"tool_choice: there is no function {chosen!r:.80} among the tools", "tool_choice")
    forced = _forced(body)
    for index, function in enumerate(functions):
        _check_function(function, f"tools[{index}].function", is_enforced=function in forced or function.strict is True)


def _check_function(function: Function, place: str, *, is_enforced: bool) -> None:
    if not _NAME.fullmatch(function.name):
        raise InvalidRequest(
            f"{place}.name must be 1 to 128 letters, digits and characters of _-./:, not {function.name!r:.80}",
            f"{place}.name",
        )
    schema = enforced_schema(function) if is_enforced else function.parameters or {}
    fault = schema_fault(schema) if is_enforced else malformed(schema)
    if fault is None and schema.get("type", "object") != "object":
        fault = f'the type of all parameters together is "object", not {schema["type"]!r:.40}'
    if fault is not None:
        raise InvalidRequest(f"{place}.parameters: {fault}", f"{place}.parameters")


def enforced_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's parameters, without what can't be enforced of it where its `strict` is false."""
    schema: dict[str, Any] = function.parameters or {}
    return loosened(schema)[0] if function.strict is False and malformed(schema) is None else schema


def _chosen(body: OffersTools) -> str | None:
    """The name of the function that tool_choice asks for. Raises InvalidRequest for choices that there aren't."""
    choice = body.tool_choice
    if isinstance(choice, dict):
        kind = choice.get("type")
        function = choice.get("custom" if kind == "custom" else "function")
        name = function.get("name") if isinstance(function, dict) else None
        if kind not in ("function", "custom") or not isinstance(name, str):
            raise InvalidRequest('tool_choice should be {"type": "function", "function": {"name": ...}}', "tool_choice")
        return name
    if choice not in (None, "none", "auto", "required"):
        raise InvalidRequest('tool_choice should be "none", "auto", "required" or a named function', "tool_choice")
    return None


def _forced(body: OffersTools) -> list[Function]:
    """The functions of which one must be called."""
    chosen = _chosen(body)
    if chosen is None and body.tool_choice != "required":
        return []
    return [tool.function for tool in body.tools or [] if chosen in (None, tool.function.name)]


def may_call(body: OffersTools) -> bool:
    """Whether tools are given, and are to be shown."""
    return bool(body.tools) and body.tool_choice != "none"


def tool_use(body: OffersTools) -> ToolUse | None:
    """The tools of a checked request; None where none may be called."""
    if not body.tools or not may_call(body):
        return None
    functions = [tool.function for tool in body.tools]
    forced = {function.name: enforced_schema(function) for function in _forced(body)}
    return ToolUse(
        shown=[_shown(tool) for tool in body.tools],
        functions={function.name: function.parameters or {} for function in functions},
        forced=forced,
        strict=frozenset(function.name for function in functions if function.strict and not forced),
        one_call=_chosen(body) is not None or not body.parallel_tool_calls,
        custom=frozenset(tool.function.name for tool in body.tools if tool.type == "custom"),
    )


def _shown(tool: Tool) -> dict[str, Any]:
    """As it came, with the type that templates know."""
    return {"type": "function", **tool.given, **({"type": "function"} if tool.type == "custom" else {})}
