"""From a body of the Responses API to what is asked."""

from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import LogprobRequest, TextPrompt
from tightrope.server.asking import Asked, ask, common
from tightrope.server.chats.custom_tools import function_of
from tightrope.server.chats.fitting import render_fitting, room_for_prompt
from tightrope.server.chats.offers import Offer, bent_choice, chosen
from tightrope.server.chats.rendering import RenderedChat, render_chat
from tightrope.server.chats.requests import Message, Tool
from tightrope.server.chats.tools import bent_tools, check_tools
from tightrope.server.dialects.responses.items import NOT_STORED, chat_of
from tightrope.server.dialects.responses.requests import MAX_KEY, MAX_VALUE, ResponsesRequest, ResponsesTool
from tightrope.server.fields.names import Bent, Ignored
from tightrope.server.fields.structured import read_grammar
from tightrope.server.replies.planning import Wishes
from tightrope.server.served import check_model, check_most
from tightrope.server.state import AppState

# What a chat calls it, and what its name is here.
NAMES = {
    r"response_format\.json_schema|response_format": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"messages": "input",
    r"reasoning_effort|enable_thinking": "reasoning.effort",
    r"max_completion_tokens": "max_output_tokens",
}
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"


def check(body: ResponsesRequest, front: AppState) -> None:
    """All that can be refused by the body alone."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise InvalidRequest(f"{name}: {NOT_STORED}", name)
    check_most("top_logprobs", body.top_logprobs, front.served().limits.max_logprobs)
    for key, value in body.metadata.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            limits = f"names have up to {MAX_KEY} characters, and values up to {MAX_VALUE}"
            raise InvalidRequest(f"metadata: {limits}", "metadata")
    if body.text.format is not None and (body.model_extra or {}).get("response_format") is not None:
        raise InvalidRequest("response_format: text.format came too; send one of them", "response_format")


def offer(body: ResponsesRequest) -> Offer:
    """The tools and the choice among them as chats have them. Raises InvalidRequest for tools that are no functions."""
    made = chosen(_tools(body), body.tool_choice, parallel_calls=body.parallel_tool_calls)
    check_tools(made)
    return made


def _tools(body: ResponsesRequest) -> list[Tool]:
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]


def _tool(tool: ResponsesTool, place: str) -> Tool:
    if tool.type == "custom":
        try:
            return Tool.model_validate({"type": "custom", "function": function_of(tool.given)})
        except ValueError as error:
            raise InvalidRequest(f"{place}: {error}", place) from None
    if tool.type not in ("", "function"):
        what = f"{tool.type[:40]} is no tool of this server: it runs none itself, and offers functions and custom ones"
        raise InvalidRequest(f"{place}.type: {what}", f"{place}.type")
    if tool.name is None:
        raise InvalidRequest(f"{place}.name: field required", f"{place}.name")
    function = {name: value for name, value in tool.given.items() if name != "type"}
    return Tool.model_validate({"type": tool.type, "function": function})


async def rendered(
    front: AppState, body: ResponsesRequest, offered: Offer, request: Request
) -> tuple[RenderedChat, list[Bent]]:
    """The chat by the template in use, and what of its items was bent. Raises InvalidRequest and ClientGone."""
    messages, bent = chat_of(body.instructions, body.input)
    adapter = check_model(body.model, front.served())

    async def render(kept: Sequence[Message]) -> RenderedChat:
        return await render_chat(
            front,
            request,
            kept,
            offered,
            wishes=Wishes(effort=body.reasoning.effort),
            has_grammar=read_grammar(body.given()) is not None,
            adapter=adapter,
        )

    if body.truncation == "disabled":
        return await render(messages), bent
    limit = None if body.max_output_tokens == -1 else body.max_output_tokens
    chat, num_out = await render_fitting(front, messages, render, room_for_prompt(front, limit), adapter)
    return chat, [*bent, *([("input", f"the oldest {num_out} messages were left out")] if num_out else [])]


def asked(front: AppState, body: ResponsesRequest, offered: Offer, chat: RenderedChat, chat_bent: list[Bent]) -> Asked:
    """What the engine is asked, once the prompt is rendered. Raises InvalidRequest."""
    read = common(body, front.served())
    top = body.top_logprobs if LOGPROBS not in body.include else body.top_logprobs or 0
    bent = [*read.bent, *chat_bent, *bent_tools(_tools(body)), *bent_choice(body.tool_choice)]
    if body.reasoning.wants_summary:
        bent.append(("reasoning.summary", "the thoughts, as they are"))
    read = replace(
        read,
        is_stream=body.stream,
        stops=chat.all_stops,
        logprobs=None if top is None else LogprobRequest(processed=False, top=top),
        shape=chat.grammar,
        shown_tokens=chat.plan.marks,
        shows_progress=False,
        ignored=[*_ignored(body, offered, chat), *chat.ignored],
        bent=bent,
        notes=chat.prompt.notes,
    )
    return ask("resp", [TextPrompt(chat.prompt.spans)], read, front.served())


def _ignored(body: ResponsesRequest, offered: Offer, chat: RenderedChat) -> list[Ignored]:
    ignored: list[Ignored] = []
    if body.store is not None:
        ignored.append(("store", "nothing is stored: send the whole conversation with each request"))
    ignored += [("include", f"{name}: there is none") for name in body.include if name not in (ENCRYPTED, LOGPROBS)]
    is_forced = chat.tools is not None and chat.tools.is_forced
    if is_forced and body.text.format is not None and body.text.format.type != "text":
        ignored.append(("text.format", "tool_choice forces a call, which goes before it"))
    if body.tool_choice is not None and not offered.tools:
        ignored.append(("tool_choice", "no tools came"))
    return ignored
