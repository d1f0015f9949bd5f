"""A chat of any dialect to its prompt, with the tools that it may call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.server.chats.call_format import takes_tools, with_tool_text
from tightrope.server.chats.messages import template_messages
from tightrope.server.chats.requests import Message
from tightrope.server.chats.tools import OffersTools, ToolUse, may_call, tool_use
from tightrope.server.fields.names import Ignored
from tightrope.server.http.hangup import or_gone
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.state import AppState


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt of a chat, what its format ends an answer with, and the tools that it may call."""

    prompt: RenderedPrompt
    stops: Sequence[str]
    tools: ToolUse | None
    ignored: Sequence[Ignored] = ()  # Fields that change nothing in it.


async def render_chat(
    front: AppState,
    request: Request,
    messages: Sequence[Message],
    offer: OffersTools,
    *,
    opens_turn: bool = True,
    continues: bool = False,
    variables: Mapping[str, Any] | None = None,
    documents: Sequence[Mapping[str, Any]] = (),
) -> RenderedChat:
    """The chat by the template in use; opens_turn: of the assistant; continues: inside the last message.

    Raises InvalidRequest, TemplateFailed and ClientGone.
    """
    template = front.template()
    source = template.source_for(has_tools=may_call(offer))
    if documents and "documents" not in source:
        raise InvalidRequest("documents: the chat template has no place for them", "documents")
    made, tools = template_messages(messages), tool_use(offer, source)
    shown = [] if tools is None else tools.shown
    if not takes_tools(source):
        made, shown = with_tool_text(made, shown), []
    rendering = template.render(
        front.renderer,
        made,
        add_generation_prompt=opens_turn,
        continue_final_message=continues,
        variables=variables,
        tools=shown,
        documents=documents,
    )
    return RenderedChat(await or_gone(request, rendering), template.stops, tools)
