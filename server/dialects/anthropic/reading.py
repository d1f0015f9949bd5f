"""From a body of the Messages API to what is asked."""

from dataclasses import replace
from typing import Any

from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import TextPrompt
from tightrope.server.asking import Asked, ask, common, refuse_log_probabilities
from tightrope.server.chats.offers import Offer, chosen
from tightrope.server.chats.rendering import RenderedChat, render_chat
from tightrope.server.chats.requests import Tool
from tightrope.server.chats.tools import bent_tools, check_tools
from tightrope.server.dialects.anthropic.bodies import AnthropicTool, MessagesRequest, ToolChoice
from tightrope.server.dialects.anthropic.turns import chat_of, goes_on
from tightrope.server.fields.names import Bent, Ignored
from tightrope.server.fields.structured import read_grammar
from tightrope.server.replies.form import reply_form
from tightrope.server.replies.planning import Wishes
from tightrope.server.served import check_model
from tightrope.server.state import AppState

Json = dict[str, Any]

# What a chat calls it, and what its name is here.
NAMES = {
    r"response_format(\.json_schema)?": "output_config.format",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    r"thinking_token_budget": "thinking.budget_tokens",
}


def offer(body: MessagesRequest) -> Offer:
    """The tools and the choice among them as chats have them. Raises InvalidRequest for tools of another kind."""
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice or ToolChoice()
    if choice.type == "tool" and choice.name is None:
        raise InvalidRequest("tool_choice.name: field required", "tool_choice.name")
    wanted: str | Json = {"name": choice.name} if choice.type == "tool" else choice.type
    made = chosen(tools, wanted, parallel_calls=not choice.disable_parallel_tool_use)
    check_tools(made)
    return made


def _tool(tool: AnthropicTool, place: str) -> Tool:
    if tool.type not in ("", "custom", "function"):
        what = f"{tool.type[:40]} is no tool of this server: it runs none of its own, and offers those of clients alone"
        raise InvalidRequest(f"{place}.type: {what}", f"{place}.type")
    for name in ("name", "input_schema"):
        if getattr(tool, name) is None:
            raise InvalidRequest(f"{place}.{name}: field required", f"{place}.{name}")
    shown = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    function = {name: value for name, value in shown.items() if value is not None}
    return Tool.model_validate({"type": tool.type and "function", "function": function})


def _wishes(body: MessagesRequest, *, has_thoughts: bool) -> Wishes:
    """What is said of thoughts. Where none are wanted, those of a template without a switch are left out."""
    effort, thinking = body.output_config.effort, body.thinking
    if thinking is None:
        return Wishes("apart", effort)
    if thinking.type in ("disabled", "between_tools"):
        return Wishes("dropped", effort or "none", enabled=False)
    return Wishes("apart", effort, enabled=True, budget=thinking.budget_tokens if has_thoughts else None)


async def rendered(
    front: AppState, body: MessagesRequest, offered: Offer, request: Request
) -> tuple[RenderedChat, list[Bent]]:
    """The chat by the template in use, and what of its turns was bent. Raises InvalidRequest and ClientGone."""
    messages, bent = chat_of(body.system, body.messages)
    form = reply_form(front.template().source_for(has_tools=bool(offered.tools)))
    continues = goes_on(body.messages)
    chat = await render_chat(
        front,
        request,
        messages,
        offered,
        opens_turn=not continues,
        continues=continues,
        wishes=_wishes(body, has_thoughts=form.has_thoughts),
        has_grammar=read_grammar(body.given()) is not None,
        adapter=check_model(body.model, front.served()),
    )
    return chat, bent


def asked(front: AppState, body: MessagesRequest, offered: Offer, chat: RenderedChat, bent: list[Bent]) -> Asked:
    """What the engine is asked, once the prompt is rendered. Raises InvalidRequest."""
    refuse_log_probabilities(body.given())
    read = common(body, front.served())
    read = replace(
        read,
        is_stream=body.stream,
        stops=chat.all_stops,
        shape=chat.grammar,
        shown_tokens=chat.plan.marks,
        shows_progress=False,
        ignored=_ignored(body, offered, chat),
        bent=[*read.bent, *bent, *bent_tools(offered.tools)],
        notes=chat.prompt.notes,
    )
    return ask("msg", [TextPrompt(chat.prompt.spans)], read, front.served())


def _ignored(body: MessagesRequest, offered: Offer, chat: RenderedChat) -> list[Ignored]:
    ignored: list[Ignored] = []
    if body.tool_choice is not None and not offered.tools:
        ignored.append(("tool_choice", "no tools came"))
    is_forced = chat.tools is not None and chat.tools.is_forced
    if is_forced and (body.output_config.format or body.output_format) is not None:
        ignored.append(("output_config.format", "tool_choice forces a call, which goes before it"))
    for why in {why for _, why in chat.ignored}:
        ignored += [("thinking", why)] if body.thinking is not None else []
        ignored += [("output_config.effort", why)] if body.output_config.effort is not None else []
    return ignored
