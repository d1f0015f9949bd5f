"""What a chat's tools come to: what the template is shown, how calls are written, and whether one is forced.

A call is written as the model was trained to: as ChatML models do, `<tool_call>` around a JSON object of name and
arguments, or as Llama 3 does, a bare JSON object of name and parameters. Which, the chat template tells. A forced call
is written by a grammar made of the function's JSON schema; with tool_choice "auto" the model writes freely, and what
it writes is looked through for calls.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.json_schema import malformed, schema_fault
from tightrope.engine.guided.loosening import loosened
from tightrope.engine.types import Grammar
from tightrope.server.chats.call_format import NAME_CHARACTER, CallFormat, call_format
from tightrope.server.chats.call_parser import CallParser
from tightrope.server.chats.requests import Function, Tool

MAX_TOOLS = 128
_NAME = re.compile(rf"{NAME_CHARACTER}{{1,128}}")


class OffersTools(Protocol):
    """What is read of a body with tools."""

    @property
    def tools(self) -> list[Tool] | None: ...
    @property
    def tool_choice(self) -> str | dict[str, Any] | None: ...
    @property
    def parallel_tool_calls(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that a chat may call."""

    shown: list[dict[str, Any]]  # The template gets the request's own JSON.
    names: frozenset[str]
    call_format: CallFormat
    grammar: Grammar | None  # A forced call has one, and so has free text in which calls of strict functions are valid.
    is_forced: bool
    stops: tuple[str, ...]  # They end an answer that may hold one call.

    def parser(self) -> CallParser:
        """Reads the calls of one answer."""
        return CallParser(self.call_format, self.names, is_forced=self.is_forced)


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
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or not isinstance(name, str):
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


def tool_use(body: OffersTools, template: str) -> ToolUse | None:
    """The tools of a checked request, for a model with this template; None where none may be called."""
    if not body.tools or not may_call(body):
        return None
    written = call_format(template)
    functions = [tool.function for tool in body.tools]
    forced = _forced(body)
    one_call = _chosen(body) is not None or not body.parallel_tool_calls or not written.opening
    text: str | None = None
    if forced:
        text = written.grammar({f.name: enforced_schema(f) for f in forced}, one_call=one_call)
    elif any(f.strict for f in functions):
        text = written.free_grammar({f.name: (f.parameters or {}) if f.strict else {} for f in functions})
    return ToolUse(
        shown=[{"type": tool.type, **tool.given} if "type" not in tool.given else tool.given for tool in body.tools],
        names=frozenset(f.name for f in functions),
        call_format=written,
        grammar=None if text is None else Grammar("lark", text, "tools"),
        is_forced=bool(forced),
        stops=(written.closing,) if one_call and written.closing and not forced else (),
    )
