"""A chat through a template, with nothing lost on the way: in the shape and the order that keep its words.

A template may refuse a chat in the order that a client sends, or leave words out without a word. What it leaves out is
told from what it changes (trimmed, escaped, cut at "</think>") by a second render with marked words in their place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightrope.server.content import Message, in_shape, pieces
from tightrope.server.errors import TemplateFailed, TemplateRefused
from tightrope.server.role_order import regular_orders
from tightrope.server.template_probe import TemplateFacts
from tightrope.server.template_renderer import TemplateRenderer

WORDS = "\ue0f3"  # around a number that stands in place of a message's words; private use, and none comes from outside

_LEFT_OUT = {
    "system": "the chat template leaves out a system message",
    "user": "the chat template leaves out what a user wrote",
}


@dataclass(frozen=True, slots=True)
class Rendering:
    """One template and what it sees beside the messages."""

    renderer: TemplateRenderer
    source: str
    facts: TemplateFacts
    variables: Mapping[str, Any]

    async def of(self, messages: list[Message]) -> tuple[str, tuple[str, ...]]:
        """The text of the chat in the first order of its roles that the template takes whole, and notes.

        If none is, the system's words are lost with a note. Raises TemplateFailed, with the template's own words on the
        chat as it came, if every order is refused or loses words of a user.
        """
        reason: TemplateFailed | None = None
        without_system: str | None = None
        for order in regular_orders(messages):
            try:
                text = await self._text(order)
            except TemplateFailed as exc:
                if reason is None and not isinstance(exc, TemplateRefused):
                    raise
                reason = reason or exc
                continue
            lost = await self._lost(order, text)
            if not lost:
                return text, () if reason is None else (_note(len(order), reason),)
            if "user" not in lost:
                without_system = without_system or text
            reason = reason or TemplateFailed(_LEFT_OUT["user" if "user" in lost else "system"], "messages")
        assert reason is not None, "no order was whole"
        if without_system is None:
            raise reason
        return without_system, (_LEFT_OUT["system"],)

    async def _text(self, messages: list[Message]) -> str:
        shaped = [in_shape(message, self.facts.shapes_of(message["role"])) for message in messages]
        return await self.renderer.render(self.source, {**self.variables, "messages": shaped})

    async def _lost(self, messages: list[Message], text: str) -> set[str]:
        """The roles of which words are nowhere in the text: system, user, both or none."""
        changed = {
            place
            for place, message in enumerate(messages)
            if message["role"] in _LEFT_OUT and not all(piece.strip() in text for piece in pieces(message))
        }
        if not changed:
            return set()
        words = [f"{WORDS}{place}{WORDS}" for place in range(len(messages))]
        marked = [m | {"content": words[place]} if place in changed else m for place, m in enumerate(messages)]
        try:
            text = await self._text(marked)
        except TemplateFailed:
            return set()  # it looks into the words themselves
        return {messages[place]["role"] for place in changed if words[place] not in text}


def _note(num_turns: int, reason: TemplateFailed) -> str:
    return f"messages were merged into {num_turns} turn{'s' if num_turns > 1 else ''}: {reason.message}"
