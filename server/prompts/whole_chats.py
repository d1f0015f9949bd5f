"""A chat through a template, with nothing lost on the way: in the shape and the order that keep its words.

A template may refuse a chat in the order that a client sends, or leave words out without a word. What it leaves out is
told from what it changes (trimmed, escaped, cut at "</think>") by a second render with marked words in their place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightrope.server.http.errors import TemplateFailed, TemplateStopped
from tightrope.server.prompts.content import Message, in_shape, pieces
from tightrope.server.prompts.role_order import regular_orders
from tightrope.server.prompts.template_probe import TemplateFacts, is_listed, keeps
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.typed_tokens import new_mark

_LEFT_OUT = {
    "system": "the chat template leaves out a system message",
    "user": "the chat template leaves out what a user wrote",
    "assistant": "the chat template leaves out what the assistant wrote",
}


@dataclass(frozen=True, slots=True)
class Written:
    """A chat's text, the messages in the order in which it was written, and what was done to them."""

    text: str
    order: list[Message]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rendering:
    """One template and what it sees beside the messages."""

    renderer: TemplateRenderer
    source: str
    facts: TemplateFacts
    variables: Mapping[str, Any]

    async def of(self, messages: list[Message]) -> Written:
        """The chat in the first order of its roles that the template takes whole.

        If none is, the system's words are lost with a note. Raises TemplateFailed, with the template's own words on the
        chat as it came, if every order is refused or loses words of a user or of the assistant.
        """
        reason: TemplateFailed | None = None
        without_system: Written | None = None
        for order in regular_orders(messages):
            try:
                text = await self.text(order)
            except TemplateStopped:
                raise
            except TemplateFailed as exc:
                reason = reason or exc
                continue
            lost = await self._lost(order, text)
            if not lost:
                return Written(text, order, () if reason is None else (_note(len(order), reason),))
            if lost == {"system"}:
                without_system = without_system or Written(text, order, (_LEFT_OUT["system"],))
            worst = next(role for role in ("user", "assistant", "system") if role in lost)
            reason = reason or TemplateFailed(_LEFT_OUT[worst], "messages")
        assert reason is not None, "no order was whole"
        if without_system is None:
            raise reason
        return without_system

    async def text(self, messages: list[Message]) -> str:
        """The text of a chat as it is. Raises TemplateFailed."""
        shaped = [self._shaped(message) for message in messages]
        return await self.renderer.render(self.source, {**self.variables, "messages": shaped})

    def _shaped(self, message: Message) -> Message:
        role, facts = message["role"], self.facts
        return in_shape(self._told(message), facts.shapes_of(role), joins_parts=role in facts.one_part)

    def _told(self, message: Message) -> Message:
        """The message with what the template wants in place of words that it hasn't got: calls may stand alone."""
        return message if message.get("content") is not None else {**message, **self.facts.call_content}

    async def _lost(self, messages: list[Message], text: str) -> set[str]:
        """The roles of which words are nowhere in the text, or there in the notation of a list alone.

        Of the assistant's some are left out on purpose, such as its thoughts; it loses them where whole turns were seen
        to be left out.
        """
        loses = self.facts.lost | self.facts.partly_lost  # Words of these that are found may be another message's.
        watched = {"system", "user"} | (loses & {"assistant"})
        changed = {place for place, m in enumerate(messages) if m["role"] in loses and "".join(pieces(m)).strip()}
        start = 0  # Messages mostly stand in their order.
        for place, message in enumerate(messages):
            for piece in pieces(message) if message["role"] in watched else ():
                words = piece.strip()
                found = text.find(words, start)
                found = text.find(words) if found < 0 else found
                start = max(start, found)
                if found < 0 or is_listed(text, found):
                    changed.add(place)
        if not changed:
            return set()
        mark = new_mark()
        marks = [f"{mark}{place:08}" for place in range(len(messages))]
        marked = [m | {"content": marks[place]} if place in changed else m for place, m in enumerate(messages)]
        try:
            text = await self.text(marked)
        except TemplateFailed:
            return set()  # The template looks into the words themselves.
        return {messages[place]["role"] for place in changed if not keeps(text, marks[place])} & watched


def _note(num_turns: int, reason: TemplateFailed) -> str:
    return f"messages were merged into {num_turns} turn{'s' if num_turns > 1 else ''}: {reason.message}"
