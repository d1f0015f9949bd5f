"""Answers of the OpenAI API as events.

This is the path that runs for every token: what is the same in all chunks is encoded once.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from tightrope.engine.types import PromptInfo
from tightrope.server.deltas.side_by_side import Deltas
from tightrope.server.dialects.openai.answers import (
    chat_logprobs,
    completion_logprobs,
    echo_offset,
    finish_reason,
    stop_reason,
    usage,
)
from tightrope.server.dialects.openai.call_parser import Arguments, CallOpened, CallParser, Piece
from tightrope.server.dialects.openai.tools import ToolUse
from tightrope.server.fields.explain import Explanation
from tightrope.server.http.sse import DONE

Events = AsyncGenerator[bytes, None]

encode = msgspec.json.Encoder().encode
OPENED = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
CLOSED = b'"delta":{},"logprobs":null,"finish_reason":'


@dataclass(frozen=True, slots=True)
class Identity:
    """What all chunks of an answer, and the whole answer, say of themselves."""

    id: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str


class _Chunks:
    """Chunks around a choice's own bytes."""

    def __init__(self, identity: Identity, kind: str, include_usage: bool) -> None:
        head = {
            "id": identity.id,
            "object": kind,
            "created": identity.created,
            "model": identity.model,
            "system_fingerprint": identity.system_fingerprint,
        }
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._prefix = self._head + b'{"index":'
        self._suffix = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def choice(self, number: int, inner: bytes) -> bytes:
        return b"%b%d,%b%b" % (self._prefix, number, inner, self._suffix)

    def usage(self, prompts: dict[int, PromptInfo], completion_tokens: int) -> bytes:
        totals = encode(usage(list(prompts.values()), completion_tokens))
        return b'%b],"usage":%b}\n\n' % (self._head, totals)

    def explained(self, explanation: Explanation, prompts: dict[int, PromptInfo]) -> bytes:
        return b'%b],"explain":%b}\n\n' % (self._head, encode(explanation.told(prompts)))


def _delta(piece: Piece) -> bytes:
    """What a piece of an answer adds to its message."""
    match piece:
        case CallOpened(index=index, call_id=call_id, name=name):
            function = {"name": name, "arguments": ""}
            return encode({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]})
        case Arguments(index=index, text=text):
            return encode({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    return b'{"content":%b}' % encode(piece)


async def chat_events(
    deltas: Deltas,
    identity: Identity,
    *,
    wants_logprobs: bool,
    include_usage: bool,
    tools: ToolUse | None = None,
    explanation: Explanation | None = None,
) -> Events:
    """Chunks of a chat answer; the role comes once per choice."""
    parsers: dict[int, CallParser] = {}
    chunks = _Chunks(identity, "chat.completion.chunk", include_usage)
    opened: set[int] = set()
    prompts: dict[int, PromptInfo] = {}
    completion_tokens = 0
    async with aclosing(deltas):
        async for number, delta in deltas:
            event = b""
            if number not in opened:
                opened.add(number)
                if tools is not None:
                    parsers[number] = tools.parser()
                event = chunks.choice(number, OPENED)
            if delta.prompt is not None:
                prompts[0] = delta.prompt
            parser = parsers.get(number)
            pieces: list[Piece] = [delta.text] if delta.text else []
            if parser is not None:
                pieces = parser.feed(delta.text) + (parser.finish() if delta.finish is not None else [])
            logprobs = encode(chat_logprobs(delta.tokens)) if wants_logprobs and delta.tokens else b"null"
            for piece in pieces or ([""] if logprobs != b"null" else []):
                inner = b'"delta":%b,"logprobs":%b,"finish_reason":null' % (_delta(piece), logprobs)
                event += chunks.choice(number, inner)
                logprobs = b"null"  # they come once
            if delta.finish is not None:
                completion_tokens += delta.finish.num_tokens
                num_calls = 0 if parser is None else parser.num_calls
                reasons = encode(finish_reason(delta.finish, num_calls)), encode(stop_reason(delta.finish))
                event += chunks.choice(number, CLOSED + b'%b,"stop_reason":%b' % reasons)
            if event:
                yield event
    if explanation is not None:
        yield chunks.explained(explanation, prompts)
    yield (chunks.usage(prompts, completion_tokens) if include_usage else b"") + DONE


async def completion_events(
    deltas: Deltas,
    identity: Identity,
    *,
    echoes: list[str],
    n: int,
    wants_logprobs: bool,
    include_usage: bool,
    explanation: Explanation | None = None,
) -> Events:
    """Chunks of completions; `echoes` are the prompts' texts to put in front, one a prompt, or none at all."""
    chunks = _Chunks(identity, "text_completion", include_usage)
    offsets: dict[int, int] = {}  # characters that the tokens listed so far have
    prompts: dict[int, PromptInfo] = {}
    completion_tokens = 0
    async with aclosing(deltas):
        async for number, delta in deltas:
            text, tokens = delta.text, delta.tokens
            if delta.prompt is not None:
                prompts[number // n] = delta.prompt
                if echoes:
                    echo, echoed = echoes[number // n], delta.prompt.tokens or ()
                    text, tokens = echo + text, (*echoed, *tokens)
                    offsets[number] = echo_offset(echo, echoed)
            logprobs = b"null"
            if wants_logprobs and tokens:
                offset = offsets.get(number, 0)
                logprobs = encode(completion_logprobs(tokens, offset))
                offsets[number] = offset + sum(len(token.text) for token in tokens)
            if delta.finish is not None:
                completion_tokens += delta.finish.num_tokens
                ends = encode(finish_reason(delta.finish)), encode(stop_reason(delta.finish))
                end = b'%b,"stop_reason":%b' % ends
            elif text or logprobs != b"null":
                end = b"null"
            else:
                continue
            yield chunks.choice(number, b'"text":%b,"logprobs":%b,"finish_reason":%b' % (encode(text), logprobs, end))
    if explanation is not None:
        yield chunks.explained(explanation, prompts)
    yield (chunks.usage(prompts, completion_tokens) if include_usage else b"") + DONE
