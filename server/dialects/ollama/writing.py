"""Ollama's two ways to write, whole and as lines of JSON, the last of which tells how it ended."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import msgspec
from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import (
    Delta,
    Finish,
    LogprobRequest,
    PromptInfo,
    PromptRead,
    Span,
    TextPrompt,
    Token,
)
from tightrope.server.answering import Dialect, Ending, checked
from tightrope.server.asking import Asked, ask, common, refuse_log_probabilities
from tightrope.server.chats.messages import bent_messages
from tightrope.server.chats.offers import Offer
from tightrope.server.chats.rendering import RenderedChat, render_chat
from tightrope.server.chats.requests import Message
from tightrope.server.chats.tools import bent_tools, check_tools
from tightrope.server.deltas.choices import Choice
from tightrope.server.dialects.ollama.bodies import OllamaBody, OllamaChat, OllamaGenerate
from tightrope.server.dialects.ollama.keep_alive import keep_alive_s
from tightrope.server.fields.logprobs import listed
from tightrope.server.fields.names import Bent, Ignored
from tightrope.server.fields.progress import prompt_progress
from tightrope.server.fields.structured import read_grammar
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.replies.events import Call, Content, Event, Reply, Thought
from tightrope.server.replies.form import ReplyPlan, ReplyReader
from tightrope.server.replies.planning import Wishes
from tightrope.server.served import check_model, check_most
from tightrope.server.state import AppState

encode = msgspec.json.Encoder().encode

T = TypeVar("T", bound=OllamaBody)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _ending(prompt: PromptInfo, finish: Finish) -> dict[str, Any]:
    """Times in nanoseconds."""
    times = finish.timings
    return {
        "done": True,
        "done_reason": "length" if finish.reason == "length" else "stop",
        "total_duration": round(1e9 * (times.queue_s + times.prefill_s + times.decode_s)),
        "load_duration": 0,
        "prompt_eval_count": prompt.num_tokens,
        "prompt_eval_duration": round(1e9 * times.prefill_s),
        "eval_count": finish.num_tokens,
        "eval_duration": round(1e9 * times.decode_s),
    }


def keep(front: AppState, body: OllamaBody) -> list[Ignored]:
    """Keep the model loaded for as long as the body says; what of that changes nothing. Raises InvalidRequest."""
    if body.keep_alive is None:
        return []
    if front.models.is_alone:
        return [("keep_alive", "the only model stays loaded")]
    front.model.idle_s = keep_alive_s(body.keep_alive)
    return []


class _Ollama(Dialect[T]):
    """Lines of JSON, the last of which tells how it ended."""

    column = "ollama"
    is_lines = True
    _plan: ReplyPlan
    _reader: ReplyReader | None

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._calls: list[Event] = []

    @staticmethod
    @abstractmethod
    def wrap(text: str, more: dict[str, Any]) -> dict[str, Any]:
        """A piece of text in the place that the route has for it, with what else the message has."""

    @classmethod
    def silence(cls, body: T) -> bytes:
        return encode({"model": body.model or "", "created_at": now(), **cls.wrap("", {}), "done": False}) + b"\n"

    @classmethod
    def _read(cls, front: AppState, body: OllamaBody, chat: RenderedChat, bent: Sequence[Bent] = ()) -> Self:
        served = front.served()
        check_most("top_logprobs", body.top_logprobs, served.limits.max_logprobs)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        refuse_log_probabilities(body.options.model_extra or {})
        read = common(body, served)
        read = replace(
            read,
            is_stream=body.stream,
            stops=chat.all_stops,
            logprobs=LogprobRequest(processed=False, top=body.top_logprobs or 0) if body.logprobs else None,
            shape=chat.grammar,
            shown_tokens=chat.plan.marks,
            ignored=[*body.overruled(), *(("think", why) for _, why in chat.ignored[:1]), *keep(front, body)],
            bent=[*read.bent, *bent],
            notes=chat.prompt.notes,
        )
        spoken = cls(ask("ollama", [TextPrompt(chat.prompt.spans)], read, served))
        spoken.wants_single_tokens = body.logprobs
        spoken._plan, spoken._reader = chat.plan, chat.plan.reader()
        return spoken

    @classmethod
    async def _render(
        cls, front: AppState, body: OllamaChat | OllamaGenerate, messages: Sequence[Message], request: Request
    ) -> RenderedChat:
        effort = body.think if isinstance(body.think, str) else None
        return await render_chat(
            front,
            request,
            messages,
            Offer(body.tools or () if isinstance(body, OllamaChat) else ()),
            wishes=Wishes(effort=effort, enabled=None if isinstance(body.think, str) else body.think),
            has_grammar=read_grammar(body.given()) is not None,
            adapter=check_model(body.model, front.served()),
        )

    def _line(self, text: str, more: dict[str, Any], message: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"model": self.asked.model, "created_at": now(), **self.wrap(text, message or {}), **more}

    def _listed(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"logprobs": listed(tokens)} if self.wants_single_tokens and tokens else {}

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        logprobs, reply, line = self._listed(delta.tokens), Reply(content=delta.text), b""
        if self._reader is not None:
            events = self._reader.feed(delta.text)
            events += self._reader.finish(is_cut=delta.finish.reason == "length") if delta.finish else []
            reply = Reply.of(event for event in events if isinstance(event, Content | Thought))
            self._calls += [event for event in events if not isinstance(event, Content | Thought)]
        thinking = {"thinking": reply.thought} if reply.thought else {}
        if reply.content or thinking or logprobs:
            line = encode(self._line(reply.content, {"done": False, **logprobs}, thinking)) + b"\n"
        if delta.finish is not None and (made := _made(Reply.of(self._calls).calls)):
            line += encode(self._line("", {"done": False}, {"tool_calls": made})) + b"\n"
        if ending is None or delta.finish is None:
            return line
        told = _ending(ending.prompts[0], checked(delta.finish)) | ending.explained
        return line + bytes(encode(self._line("", told)) + b"\n")

    def progress(self, number: int, read: PromptRead) -> bytes:
        return encode(self._line("", {"done": False, "prompt_progress": prompt_progress(read)})) + b"\n"

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        told = _ending(choice.prompt, checked(choice.finish)) | self._listed(choice.tokens)
        reply = self._plan.whole(choice.text, is_cut=choice.finish.reason == "length")
        message: dict[str, Any] = {"thinking": reply.thought} if reply.thought else {}
        message |= {"tool_calls": made} if (made := _made(reply.calls)) else {}
        return self._line(reply.content, told | ending.explained, message)


class Generate(_Ollama[OllamaGenerate]):
    """POST /api/generate with a prompt."""

    @classmethod
    async def read(cls, front: AppState, body: OllamaGenerate, request: Request) -> Self:
        if body.raw:
            if body.system:
                raise InvalidRequest("system: a raw prompt is run as it is, so write it into the prompt", "system")
            ignored = [] if body.think is None else [("think", "a raw prompt is run as it is")]
            return cls._read(front, body, RenderedChat(RenderedPrompt((Span(body.prompt),)), ignored=ignored))
        turns = [("system", body.system), ("user", body.prompt)]
        messages = [Message.model_validate({"role": role, "content": text}) for role, text in turns if text]
        return cls._read(front, body, await cls._render(front, body, messages, request))

    @staticmethod
    def wrap(text: str, more: dict[str, Any]) -> dict[str, Any]:
        return {"response": text, **more}


class Chat(_Ollama[OllamaChat]):
    """POST /api/chat with messages. Calls come whole, in a line of their own behind the text."""

    @classmethod
    async def read(cls, front: AppState, body: OllamaChat, request: Request) -> Self:
        check_tools(Offer(body.tools or ()))
        bent = [*bent_messages(body.messages), *bent_tools(body.tools or ())] if body.explain else ()
        return cls._read(front, body, await cls._render(front, body, _told(body.messages), request), bent)

    @staticmethod
    def wrap(text: str, more: dict[str, Any]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, **more}}


def _made(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Calls as Ollama has them: their arguments are an object. One that was cut inside of them is left out."""
    made = []
    for call in calls:
        try:
            arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
        except msgspec.MsgspecError:
            continue
        made.append({"id": call.call_id, "function": {"name": call.name, "arguments": arguments}})
    return made


def _told(messages: Sequence[Message]) -> list[Message]:
    """The messages with what templates want to know and Ollama's clients leave out: ids of calls, names of results."""
    told, open_ids = [], list[str]()
    for place, message in enumerate(messages):
        given = dict(message.given)
        if message.tool_calls:
            given["tool_calls"] = [
                {**call.given, "id": call.id or f"call{place:03}{number:02}"}  # Nine letters and digits: Mistral's.
                for number, call in enumerate(message.tool_calls)
            ]
            open_ids = [call["id"] for call in given["tool_calls"]]
        elif message.role == "tool":
            first = open_ids.pop(0) if open_ids else f"call{place:05}"
            given["tool_call_id"] = message.tool_call_id or first
            if (name := given.get("tool_name")) and not message.name:
                given["name"] = name
        told.append(type(message).model_validate(given))
    return told
