"""Which tools a chat may call, and whether it has to: the choice among them in every form that clients have for it.

OpenAI's chats put the name of a function into an object of its own, its Responses beside the type; both have a list of
those that are allowed. Anthropic's choices are objects, and Mistral's clients say "any" for "required".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tightrope.engine.errors import InvalidRequest
from tightrope.server.chats.requests import Tool
from tightrope.server.fields.names import Bent

Choice = Literal["none", "auto", "required"]

_WORDS: Mapping[str, Choice] = {"none": "none", "auto": "auto", "required": "required", "any": "required"}
_FORMS = 'tool_choice should be "none", "auto", "required", {"type": "function", ...} with a name, or allowed_tools'


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
    """The tools that may be called. named: this function has to be, and no other."""

    tools: Sequence[Tool] = ()
    choice: Choice = "auto"
    named: str | None = None
    parallel_calls: bool = True

    @property
    def may_call(self) -> bool:
        """Whether the tools are to be shown."""
        return bool(self.tools) and self.choice != "none"


def offer_of(body: OffersTools) -> Offer:
    """What the body of a chat offers. Raises InvalidRequest for choices that there aren't."""
    return chosen(body.tools or (), body.tool_choice, parallel_calls=body.parallel_tool_calls)


def chosen(tools: Sequence[Tool], tool_choice: str | Mapping[str, Any] | None, *, parallel_calls: bool = True) -> Offer:
    """The tools with the choice among them. Raises InvalidRequest for one that there isn't, or that nothing fits."""
    word, named = _word(tool_choice), None
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "allowed_tools":
        tools, word = _allowed(tools, tool_choice)
    elif word is None:
        word, named = "required", _known(_name(tool_choice), tools, "tool_choice")
    if word == "required" and not tools:
        raise InvalidRequest("tool_choice is only allowed when tools are given", "tool_choice")
    return Offer(tools, word, named, parallel_calls)


def bent_choice(tool_choice: str | Mapping[str, Any] | None) -> list[Bent]:
    """A word for a choice that isn't the contract's own."""
    is_bent = tool_choice is not None and tool_choice != (word := _word(tool_choice)) and word is not None
    return [("tool_choice", f'taken as "{word}"')] if is_bent else []


def _word(tool_choice: object) -> Choice | None:
    """The choice that is none of a function, perhaps in an object of this type."""
    kind = tool_choice.get("type") if isinstance(tool_choice, Mapping) else tool_choice
    if kind is None and not isinstance(tool_choice, Mapping):
        return "auto"
    return _WORDS.get(kind) if isinstance(kind, str) else None


def _name(choice: object) -> str:
    """The function that a choice names, in an object of its own or beside the type. Raises InvalidRequest."""
    if isinstance(choice, Mapping) and choice.get("type", "function") in ("function", "custom"):
        inner = next((choice[kind] for kind in ("function", "custom") if choice.get(kind) is not None), choice)
        if isinstance(inner, Mapping) and isinstance(name := inner.get("name"), str):
            return name
    raise InvalidRequest(_FORMS, "tool_choice")


def _known(name: str, tools: Sequence[Tool], place: str) -> str:
    if not tools:
        raise InvalidRequest("tool_choice is only allowed when tools are given", "tool_choice")
    if name not in {tool.function.name for tool in tools}:
        raise InvalidRequest(f"{place}: there is no function {name!r:.80} among the tools", "tool_choice")
    return name


def _allowed(tools: Sequence[Tool], choice: Mapping[str, Any]) -> tuple[list[Tool], Choice]:
    """Those of the tools that a choice leaves, and whether one of them has to be called."""
    inner = choice.get("allowed_tools")
    told = inner if isinstance(inner, Mapping) else choice
    mode, listed = told.get("mode", "auto"), told.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise InvalidRequest('tool_choice: allowed_tools has a mode, "auto" or "required", and tools', "tool_choice")
    names = {_known(_name(one), tools, "tool_choice.tools") for one in listed}
    return [tool for tool in tools if tool.function.name in names], mode
