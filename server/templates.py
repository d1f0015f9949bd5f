"""Chat messages to prompt text, by the Jinja template from the model's files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tightrope.engine.types import ModelInfo, Span
from tightrope.server.builtin_templates import CHATML, PROMPT_FORMATS, PromptFormat
from tightrope.server.content import Message, with_text
from tightrope.server.errors import TemplateFailed
from tightrope.server.template_probe import TemplateFacts, probe
from tightrope.server.template_renderer import TemplateRenderer
from tightrope.server.whole_chats import WORDS, Rendering

# Marks around special-token texts in what people wrote, and at the place where an answer goes on. They are private-use
# characters; those that come in from outside are removed first, so every mark in the rendered prompt is ours.
OPEN, CLOSE, GO_ON = "\ue0f0", "\ue0f1", "\ue0f2"
_NO_MARKS = str.maketrans("", "", OPEN + CLOSE + GO_ON + WORDS)

TOOL_USE = "tool_use"  # the name of the template that transformers takes when tools are given


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as one prompt; `notes` say what was done to its messages that nobody asked for."""

    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """The templates of the served model, and what its special tokens look like.

    `chosen` is the name of a built-in format, of one of the model's own templates, or a Jinja source, and wins over the
    model's own; `variables` are the server's, beneath those of a request.
    """

    def __init__(self, info: ModelInfo, chosen: str | None = None, variables: Mapping[str, str] | None = None) -> None:
        own = CHATML if info.chat_template is None else PromptFormat(info.chat_template)
        named = dict(info.chat_templates)
        in_use = own if chosen is None else PROMPT_FORMATS.get(chosen, PromptFormat(named.get(chosen, chosen)))
        self.source = in_use.source
        self.stops = in_use.stops
        self._tool_use = named.get(TOOL_USE) if chosen is None else None
        self._info = info
        self._variables = dict(variables or {})
        self._facts: dict[str, TemplateFacts] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Every template that a chat may be written by."""
        return (self.source,) if self._tool_use is None else (self.source, self._tool_use)

    def source_for(self, *, has_tools: bool) -> str:
        """The template of a chat with tools, or without: as in transformers, one named "tool_use" is for the first."""
        return self._tool_use if has_tools and self._tool_use is not None else self.source

    async def facts(self, renderer: TemplateRenderer, source: str) -> TemplateFacts:
        """What one of the sources does with words that it is given; found out once."""
        known = self._facts.get(source)
        if known is None:
            fixed = self._fixed(None) | {"documents": None}
            known = await probe(renderer, source, fixed, with_tools=source == self._tool_use)
            self._facts[source] = known
        return known

    async def notes(self, renderer: TemplateRenderer) -> tuple[str, ...]:
        """What a person should know of these templates before anyone chats."""
        facts = [await self.facts(renderer, source) for source in self.sources]
        return tuple(dict.fromkeys(note for known in facts if (note := _note(known)) is not None))

    async def render(
        self,
        renderer: TemplateRenderer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> RenderedPrompt:
        """The prompt. What people wrote stays plain text, even if it looks like a special token.

        Content is text or a list of parts of text. `variables` are the request's own, beneath the fixed ones. With
        continue_final_message the text ends inside the last message. A chat that the template refuses, or of whose
        words it leaves some out, is tried in stricter orders of its roles. Raises TemplateFailed, for a refusal with
        the template's words on the chat as it came.
        """
        try:
            marked = [_mapped(message, self._mark) for message in messages]
            if continue_final_message:
                marked[-1] = with_text(marked[-1], lambda text: text + GO_ON)
            source = self.source_for(has_tools=bool(tools))
            fixed = self._fixed(variables) | {
                "tools": [_mapped(tool, self._mark) for tool in tools] or None,
                "add_generation_prompt": add_generation_prompt,
            }
            facts = await self.facts(renderer, source)
            text, notes = await Rendering(renderer, source, facts, fixed).of(marked)
        except RecursionError:
            raise TemplateFailed("the messages are nested too deeply", "messages") from None
        if continue_final_message:
            text, mark, _ = text.rpartition(GO_ON)
            if not mark:
                raise TemplateFailed("the chat template leaves out the message to be continued", "messages")
        return RenderedPrompt(spans(text), notes)

    def _fixed(self, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "documents": None,
            **self._variables,
            **(variables or {}),
            "bos_token": self._info.bos_token or "",
            "eos_token": self._info.eos_token or "",
            **dict(self._info.named_tokens),
        }

    def _mark(self, text: str) -> str:
        special = special_pattern(self._info.special_texts)
        text = text.translate(_NO_MARKS)
        return special.sub(rf"{OPEN}\g<0>{CLOSE}", text) if special else text


def _note(facts: TemplateFacts) -> str | None:
    mend = "--chat-template sets another"
    if facts.is_broken:
        return f"the chat template can't write even a word of one user; {mend}"
    if "user" in facts.lost:
        return f"the chat template leaves out what users write, as text and as parts: chats are refused; {mend}"
    if "user" in facts.partly_lost:
        return f"the chat template leaves out some turns of the user: chats of several turns are refused; {mend}"
    return None


@lru_cache(maxsize=4)
def special_pattern(special_texts: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds special-token texts, the longest of several. White space alone is text in every chat."""
    texts = sorted({text for text in special_texts if text.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _mapped(message: Mapping[str, Any], change: Callable[[str], str]) -> Message:
    return {name: _map_texts(item, change, name) for name, item in message.items()}


def _map_texts(value: object, change: Callable[[str], str], key: str = "") -> object:
    """Change every text in a message but those that the template compares: role and type."""
    if isinstance(value, str):
        return value if key in ("role", "type") else change(value)
    if isinstance(value, dict):
        return {name: _map_texts(item, change, name) for name, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value


def spans(rendered: str) -> tuple[Span, ...]:
    """Cut a rendered prompt at its marks.

    A marked text is plain only while both marks still enclose it: a template that cuts messages into pieces (at
    "</think>", say) may have torn them apart, and then the marks alone disappear.
    """
    pieces: list[Span] = []
    for index, piece in enumerate(re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}", rendered)):
        is_plain = index % 2 == 1
        text = piece.translate(_NO_MARKS)
        if text:
            pieces.append(Span(text, parse_special=not is_plain))
    return tuple(pieces)
