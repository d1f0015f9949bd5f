"""Ollama's two ways to write, whole and as lines of JSON, the last of which tells how it ended."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import msgspec
from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import (
    Delta,
    Finish,
    Grammar,
    LogprobRequest,
    PromptInfo,
    PromptRead,
    Span,
    TextPrompt,
    Token,
)
from tightrope.server.answering import Dialect, Ending, checked
from tightrope.server.asking import ask, common, refuse_log_probabilities
from tightrope.server.chats.call_parser import Call, CallParser
from tightrope.server.chats.messages import bent_messages
from tightrope.server.chats.rendering import RenderedChat, render_chat
from tightrope.server.chats.requests import Message, Tool
from tightrope.server.chats.tools import ToolUse, check_tools
from tightrope.server.deltas.choices import Choice
from tightrope.server.dialects.ollama.bodies import OllamaBody, OllamaChat, OllamaGenerate
from tightrope.server.fields.logprobs import listed
from tightrope.server.fields.names import Bent
from tightrope.server.fields.progress import prompt_progress
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.served import check_most
from tightrope.server.state import AppState

encode = msgspec.json.Encoder().encode

T = TypeVar("T", bound=OllamaBody)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class _Offer:
    """Tools among which the model chooses: Ollama has no other choice."""

    tools: list[Tool] | None
    tool_choice: None = None
    parallel_tool_calls: bool = True


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


class _Ollama(Dialect[T]):
    """Lines of JSON, the last of which tells how it ended."""

    column = "ollama"
    is_lines = True
    tools: ToolUse | None = None

    @staticmethod
    @abstractmethod
    def wrap(text: str) -> dict[str, Any]:
        """A piece of text in the place that the route has for it."""

    @classmethod
    def _read(cls, front: AppState, body: OllamaBody, chat: RenderedChat, bent: Sequence[Bent] = ()) -> Self:
        served = front.served()
        check_most("top_logprobs", body.top_logprobs, served.limits.max_logprobs)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        refuse_log_probabilities(body.options.model_extra or {})
        tools, read = chat.tools, common(body, served)

        def shape(asked: Grammar | None) -> Grammar | None:
            return asked if asked is not None or tools is None else tools.grammar

        read = replace(
            read,
            is_stream=body.stream,
            stops=[*chat.stops, *(() if tools is None else tools.stops)],
            logprobs=LogprobRequest(processed=False, top=body.top_logprobs or 0) if body.logprobs else None,
            shape=shape,
            ignored=body.overruled(),
            bent=[*read.bent, *bent],
            notes=chat.prompt.notes,
        )
        spoken = cls(ask("ollama", [TextPrompt(chat.prompt.spans)], read, served))
        spoken.wants_single_tokens = body.logprobs
        spoken.tools = tools
        return spoken

    def _line(self, text: str, more: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.asked.model, "created_at": now(), **self.wrap(text), **more}

    def _listed(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"logprobs": listed(tokens)} if self.wants_single_tokens and tokens else {}

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        line, logprobs = b"", self._listed(delta.tokens)
        if delta.text or logprobs:
            line = encode(self._line(delta.text, {"done": False, **logprobs})) + b"\n"
        return line + self._last(delta, ending)

    def _last(self, delta: Delta, ending: Ending | None) -> bytes:
        if ending is None or delta.finish is None:
            return b""
        told = _ending(ending.prompts[0], checked(delta.finish)) | ending.explained
        return bytes(encode(self._line("", told)) + b"\n")

    def progress(self, number: int, read: PromptRead) -> bytes:
        return encode(self._line("", {"done": False, "prompt_progress": prompt_progress(read)})) + b"\n"

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        told = _ending(choice.prompt, checked(choice.finish)) | self._listed(choice.tokens)
        return self._line(choice.text, told | ending.explained)


class Generate(_Ollama[OllamaGenerate]):
    """POST /api/generate with a prompt."""

    @classmethod
    async def read(cls, front: AppState, body: OllamaGenerate, request: Request) -> Self:
        if body.raw:
            if body.system:
                raise InvalidRequest("system: a raw prompt is run as it is, so write it into the prompt", "system")
            return cls._read(front, body, RenderedChat(RenderedPrompt((Span(body.prompt),)), (), None))
        turns = [("system", body.system), ("user", body.prompt)]
        messages = [Message.model_validate({"role": role, "content": text}) for role, text in turns if text]
        return cls._read(front, body, await render_chat(front, request, messages, _Offer(None)))

    @staticmethod
    def wrap(text: str) -> dict[str, Any]:
        return {"response": text}


class Chat(_Ollama[OllamaChat]):
    """POST /api/chat with messages. Calls come whole, in a line of their own behind the text."""

    _parser: CallParser | None = None
    _text = ""  # What came so far of an answer with tools.

    @classmethod
    async def read(cls, front: AppState, body: OllamaChat, request: Request) -> Self:
        offer = _Offer(body.tools)
        check_tools(offer)
        messages = _told(body.messages)
        bent = bent_messages(body.messages) if body.explain else ()
        return cls._read(front, body, await render_chat(front, request, messages, offer), bent)

    @staticmethod
    def wrap(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        if self.tools is None:
            return super().event(number, delta, ending)
        self._parser = self._parser or self.tools.parser()
        self._text += delta.text
        is_cut = delta.finish is not None and delta.finish.reason == "length"
        pieces = self._parser.feed(delta.text) + (self._parser.finish(is_cut=is_cut) if delta.finish else [])
        text, logprobs = "".join(piece for piece in pieces if isinstance(piece, str)), self._listed(delta.tokens)
        line = encode(self._line(text, {"done": False, **logprobs})) + b"\n" if text or logprobs else b""
        if delta.finish is not None:
            _, calls = self.tools.parser().whole(self._text, is_cut=is_cut)
            if made := _made(calls):
                message = {"role": "assistant", "content": "", "tool_calls": made}
                line += encode(self._line("", {"message": message, "done": False})) + b"\n"
        return line + self._last(delta, ending)

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        if self.tools is None:
            return super().whole(choices, ending)
        text, calls = self.tools.parser().whole(choice.text, is_cut=choice.finish.reason == "length")
        message = {"role": "assistant", "content": text} | ({"tool_calls": made} if (made := _made(calls)) else {})
        told = _ending(choice.prompt, checked(choice.finish)) | self._listed(choice.tokens)
        return self._line("", {"message": message} | told | ending.explained)


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
