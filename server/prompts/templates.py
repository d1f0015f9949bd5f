"""Chat messages to prompt text, by the Jinja template from the model's files."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tightrope.engine.types import ModelInfo, Span
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.prompts.content import Message, with_text
from tightrope.server.prompts.prompt_formats import CHATML, PROMPT_FORMATS, PromptFormat
from tightrope.server.prompts.template_probe import TemplateFacts, probe
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.typed_tokens import TypedTokens, new_mark, special_texts
from tightrope.server.prompts.whole_chats import Rendering

# The key is a template, what it sees beside messages, and with_tools.
Probed = dict[tuple[Hashable, ...], TemplateFacts]
NO_TEMPLATE = "the model's file has no chat template: chats are written as ChatML; --chat-template sets another"
TOOL_USE = "tool_use"  # transformers takes the template of this name when tools are given.


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as one prompt; `notes` say what was done to its messages that nobody asked for."""

    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """The templates of the served model, and what its special tokens look like.

    `chosen` is the name of a built-in format, of one of the model's own templates, or a Jinja source, and wins over the
    model's own; `variables` are the server's, beneath those of a request. What is found out about templates is kept in
    `probed`, which several objects may share.
    """

    def __init__(
        self,
        info: ModelInfo,
        chosen: str | None = None,
        variables: Mapping[str, str] | None = None,
        probed: Probed | None = None,
    ) -> None:
        own = CHATML if info.chat_template is None else PromptFormat(info.chat_template)
        named = dict(info.chat_templates)
        in_use = own if chosen is None else PROMPT_FORMATS.get(chosen, PromptFormat(named.get(chosen, chosen)))
        self.source = in_use.source
        self.stops = in_use.stops
        self._tool_use = (named.get(TOOL_USE) or None) if chosen is None else None
        self._info = info
        self._special = special_texts((*info.special_texts, *info.adapter_texts))
        self._variables = dict(variables or {})
        self._probed: Probed = {} if probed is None else probed
        self._is_guess = chosen is None and info.chat_template is None

    @property
    def sources(self) -> tuple[str, ...]:
        """Every template that a chat may be written by."""
        return (self.source,) if self._tool_use is None else (self.source, self._tool_use)

    def source_for(self, *, has_tools: bool) -> str:
        """The template of a chat with tools, or without: as in transformers, one named "tool_use" is for the first."""
        return self._tool_use if has_tools and self._tool_use is not None else self.source

    async def facts(self, renderer: TemplateRenderer, source: str) -> TemplateFacts:
        """What one of the sources does with words that it is given; found out once."""
        fixed, with_tools = self._fixed(None), source == self._tool_use
        key = (source, with_tools, *sorted(fixed.items()))
        if key not in self._probed:
            self._probed[key] = await probe(renderer, source, fixed | {"documents": None}, with_tools=with_tools)
        return self._probed[key]

    async def notes(self, renderer: TemplateRenderer) -> tuple[str, ...]:
        """What a person should know of these templates before anyone chats."""
        facts = [await self.facts(renderer, source) for source in self.sources]
        guess = (NO_TEMPLATE,) if self._is_guess else ()
        return (*guess, *dict.fromkeys(note for known in facts if (note := _note(known)) is not None))

    async def render(
        self,
        renderer: TemplateRenderer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
    ) -> RenderedPrompt:
        """The prompt. What people wrote stays plain text, even if it looks like a special token.

        Content is text or a list of parts of text. `variables` are the request's own, beneath the fixed ones. With
        continue_final_message the text ends inside the last message. A chat that the template refuses, or of whose
        words it leaves some out, is tried in stricter orders of its roles. Raises TemplateFailed, for a refusal with
        the template's words on the chat as it came.
        """
        chat, go_on = list(messages), new_mark()
        if continue_final_message:
            chat[-1] = with_text(chat[-1], lambda text: text + go_on)
        source = self.source_for(has_tools=bool(tools))
        seen = {"tools": list(tools), "documents": list(documents)}
        fixed = self._fixed(variables) | {"add_generation_prompt": add_generation_prompt}
        try:
            facts = await self.facts(renderer, source)
            rendering = Rendering(renderer, source, facts, fixed | _or_none(seen))
            written = await rendering.of(chat)
            typed = TypedTokens(self._special)
            order, shown = list(map(typed.marked, written.order)), typed.marked(seen)
            marked = written.text
            if (order, shown) != (written.order, seen):
                marked = await replace(rendering, variables=fixed | _or_none(shown)).text(order)
        except RecursionError:
            raise TemplateFailed("messages or tools are nested too deeply", "messages") from None
        prompt = written.text
        if continue_final_message:
            prompt, marked = _before(go_on, prompt), _before(go_on, marked)
        return RenderedPrompt(typed.spans(prompt, marked), written.notes)

    def _fixed(self, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            **self._variables,
            **(variables or {}),
            "bos_token": self._info.bos_token or "",
            "eos_token": self._info.eos_token or "",
            **dict(self._info.named_tokens),
        }


def _or_none(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Templates are told of tools and documents that there are none by none, and not by an empty list."""
    return {name: value or None for name, value in seen.items()}


def _before(mark: str, text: str) -> str:
    before, found, _ = text.rpartition(mark)
    if not found:
        raise TemplateFailed("the chat template leaves out the message to be continued", "messages")
    return before


def _note(facts: TemplateFacts) -> str | None:
    mend = "--chat-template sets another"
    if facts.is_broken:
        return f"the chat template can't write even a word of one user; {mend}"
    if "user" in facts.lost:
        return f"the chat template leaves out what users write, as text and as parts: chats are refused; {mend}"
    if "user" in facts.partly_lost:
        return f"the chat template leaves out some turns of the user: chats of several turns are refused; {mend}"
    if "assistant" in facts.lost:
        return f"the chat template leaves out what the assistant wrote: chats with its turns are refused; {mend}"
    return None
