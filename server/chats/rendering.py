"""A chat of any dialect to its prompt, with the tools that it may call, and how what is written to it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Grammar
from tightrope.server.chats.messages import template_messages
from tightrope.server.chats.offers import Offer
from tightrope.server.chats.requests import Message
from tightrope.server.chats.tools import ToolUse, tool_use
from tightrope.server.fields.names import Ignored
from tightrope.server.http.hangup import or_gone
from tightrope.server.prompts.content import text_of
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.replies.call_ids import wants_short_ids, with_short_ids
from tightrope.server.replies.form import ReplyPlan, reply_form
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.planning import Wishes, find_spelling, framed, plan_reply, thinking_variables
from tightrope.server.replies.tools_in_words import takes_tools, with_tool_text
from tightrope.server.state import AppState

AS_WRITTEN = ReplyPlan(reply_form(""), "outside")  # An answer is content from end to end.


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt of a chat, the tools that it may call, and how what is written to it is read."""

    prompt: RenderedPrompt
    stops: Sequence[str] = ()  # The prompt's format ends an answer with these.
    plan: ReplyPlan = AS_WRITTEN
    tools: ToolUse | None = None
    wishes: Wishes = field(default_factory=Wishes)
    spelling: Spelling = field(default_factory=Spelling)
    ignored: Sequence[Ignored] = ()

    @property
    def all_stops(self) -> list[str]:
        """What ends an answer: the prompt's format, and the end of a call where no other may follow."""
        return [*self.stops, *(() if self.tools is None else self.tools.stops(self.plan.form.calls))]

    def grammar(self, asked: Grammar | None) -> Grammar | None:
        """The answer's grammar. A response_format speaks of text, so a forced call goes before it.

        Raises InvalidRequest where both count.
        """
        tools = self.tools
        if tools is not None and tools.is_forced and asked is not None and asked.field != "response_format":
            raise InvalidRequest(f"{asked.field} and a tool_choice that forces a call exclude each other", asked.field)
        of_calls = tools is not None and (tools.is_forced or asked is None)
        grammar = tools.grammar(self.plan.form.calls, self.spelling) if tools is not None and of_calls else asked
        return framed(self.plan, self.wishes, grammar, self.spelling, is_final=not of_calls)


async def render_chat(
    front: AppState,
    request: Request,
    messages: Sequence[Message],
    offer: Offer,
    *,
    opens_turn: bool = True,
    continues: bool = False,
    variables: Mapping[str, Any] | None = None,
    documents: Sequence[Mapping[str, Any]] = (),
    wishes: Wishes | None = None,
    has_grammar: bool = False,
    adapter: str | None = None,
) -> RenderedChat:
    """The chat by the template in use; opens_turn: of the assistant; continues: inside the last message.

    variables: the request's own, which count more than its wishes; has_grammar: a shape is asked for. Raises
    InvalidRequest, TemplateFailed and ClientGone.
    """
    template, wishes = front.template(), wishes or Wishes()
    source = template.source_for(has_tools=offer.may_call)
    if documents and "documents" not in source:
        raise InvalidRequest("documents: the chat template has no place for them", "documents")
    form, tools = reply_form(source), tool_use(offer)
    made, shown = template_messages(messages), [] if tools is None else tools.shown
    made = with_short_ids(made) if wants_short_ids(source) else made
    if not takes_tools(source):
        made, shown = with_tool_text(made, shown), []
    seen = {**thinking_variables(form, wishes), **(variables or {})}
    rendering = template.render(
        front.renderer,
        made,
        add_generation_prompt=opens_turn,
        continue_final_message=continues,
        variables=seen,
        tools=shown,
        documents=documents,
    )
    prompt = await or_gone(request, rendering)
    wishes = replace(wishes, is_off=False in (seen.get("enable_thinking"), seen.get("thinking")))
    text = "".join(span.text for span in prompt.spans)
    plan = plan_reply(form, wishes, text, text_of(made[-1]) if continues else None)
    spelling = Spelling()
    if tools is not None:
        plan = replace(plan, functions=tools.functions, one_call=tools.one_call, custom=tools.custom)
    if has_grammar or wishes.budget is not None or (tools is not None and tools.needs_grammar):
        spelling = await find_spelling(front.engine, form.marks(has_calls=tools is not None), adapter)
    ignored = [] if form.switches else [(name, "the chat template has no variable for it") for name in wishes.named]
    return RenderedChat(prompt, template.stops, plan, tools, wishes, spelling, ignored)
