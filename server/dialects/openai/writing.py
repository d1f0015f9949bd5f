"""The OpenAI API as a dialect: chats and completions, whole and as events.

Events are made for every token: what is the same in all chunks is encoded once.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeVar

import msgspec
from fastapi import Request

from tightrope import __version__
from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.types import Delta, GenerateRequest, PromptRead, TextPrompt, Token
from tightrope.server.answering import Dialect, Ending
from tightrope.server.asking import Asked
from tightrope.server.deltas.choices import Choice
from tightrope.server.deltas.prompt_ids import prompt_ids
from tightrope.server.dialects.openai.answers import (
    chat_logprobs,
    chat_message,
    completion_logprobs,
    echo_offset,
    finish_reason,
    is_cut,
    prompt_logprobs,
    stop_reason,
    usage,
)
from tightrope.server.dialects.openai.reading import chat_asked, check_chat, completion_asked, rendered_chat
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest, SamplingBody
from tightrope.server.fields.progress import prompt_progress
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.sse import DONE
from tightrope.server.replies.events import CallArguments, CallBegin, CallInput, Content, Event, Thought
from tightrope.server.replies.form import ReplyPlan, ReplyReader
from tightrope.server.state import AppState

S = TypeVar("S", bound=SamplingBody)

encode = msgspec.json.Encoder().encode
OPENED = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
CLOSED = b'"delta":{},"logprobs":null,"finish_reason":'
PLAIN = b'"delta":{"content":%b},"logprobs":null,"finish_reason":null'


class _OpenAI(Dialect[S]):
    """What surrounds the choices."""

    kind: str  # It names a whole answer.
    empty: bytes  # What a choice's chunk has when nothing has come of it.
    chunk_kind: str

    def __init__(self, asked: Asked, body: S) -> None:
        super().__init__(asked)
        self._body = body
        self._shows_ids = body.return_token_ids
        self._prompt_ids: Sequence[Sequence[int]] = ()  # Those of each prompt, where they are asked for.
        self._head: dict[str, Any] = {
            "id": asked.id,
            "object": self.chunk_kind if asked.is_stream else self.kind,
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"tightrope-{__version__}",
        }
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage
        self._opening = b"data: " + encode(self._head)[:-1] + b',"choices":['
        self._prefix = self._opening + b'{"index":'
        self._suffix = b'}],"usage":null}\n\n' if self._has_usage else b"}]}\n\n"

    def _chunk(self, number: int, inner: bytes) -> bytes:
        """One choice's own bytes, with what is around them."""
        return b"%b%d,%b%b" % (self._prefix, number, inner, self._suffix)

    def progress(self, number: int, read: PromptRead) -> bytes:
        told = encode(prompt_progress(read))
        head = b"%b%d,%b}]" % (self._prefix, number, self.empty)
        return b'%b,"prompt_progress":%b%b' % (head, told, self._suffix.removeprefix(b"}]"))

    def _last_chunks(self, ending: Ending) -> bytes:
        """What comes behind all choices."""
        last = b""
        if ending.explained:
            last = b"%b],%b\n\n" % (self._opening, encode(ending.explained)[1:])
        if self._has_usage:
            last += b'%b],"usage":%b}\n\n' % (self._opening, encode(usage(ending.prompts, ending.num_tokens)))
        return last + DONE

    async def list_prompts(self, front: AppState, request: Request) -> Self:
        """Have the token ids of the prompts, as they will be run, if they are asked for. Raises as `tokenize`."""
        if self._shows_ids:
            self._prompt_ids = await or_gone(request, prompt_ids(front, self.asked.requests))
        return self

    def _ids(self, tokens: Iterable[Token]) -> dict[str, Any]:
        return {"token_ids": [token.token_id for token in tokens]} if self._shows_ids else {}

    def _whole(self, choices: list[dict[str, Any]], ending: Ending) -> dict[str, Any]:
        totals = usage(ending.prompts, ending.num_tokens)
        return {**self._head, "choices": choices, "usage": totals, **ending.explained}

    def _scored_prompt(self, choice: Choice) -> dict[str, Any]:
        top = self._body.prompt_logprobs
        return {} if top is None else {"prompt_logprobs": prompt_logprobs(choice.prompt.tokens or (), top)}


def _message_delta(event: Event, *, is_older: bool) -> bytes | None:
    """What a piece of an answer adds to its message. is_older: its one call is told as that of a function."""
    match event:
        case Content(text):
            return b'{"content":%b}' % encode(text)
        case Thought(text):
            return b'{"reasoning_content":%b}' % encode(text)
        case CallBegin(index=index, call_id=call_id, name=name, is_custom=True):
            custom = {"name": name, "input": ""}
            return encode({"tool_calls": [{"index": index, "id": call_id, "type": "custom", "custom": custom}]})
        case CallInput(index=index, text=text):
            return encode({"tool_calls": [{"index": index, "custom": {"input": text}}]})
        case CallBegin(name=name) if is_older:
            return encode({"function_call": {"name": name, "arguments": ""}})
        case CallArguments(text=text) if is_older:
            return encode({"function_call": {"arguments": text}})
        case CallBegin(index=index, call_id=call_id, name=name):
            function = {"name": name, "arguments": ""}
            return encode({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]})
        case CallArguments(index=index, text=text):
            return encode({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    return None


class Chat(_OpenAI[ChatRequest]):
    """POST /v1/chat/completions. The role comes once per choice."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    empty = PLAIN % b'""'

    def __init__(self, asked: Asked, body: ChatRequest, plan: ReplyPlan) -> None:
        super().__init__(asked, body)
        self._plan = plan
        self._is_older = bool(body.older)
        self._is_plain = plan.reader() is None and not body.logprobs and not self._shows_ids
        self._readers: dict[int, ReplyReader | None] = {}  # A choice is here once it has begun.

    @classmethod
    async def read(cls, front: AppState, body: ChatRequest, request: Request) -> Self:
        served = front.served()
        check_chat(body, served)
        chat = await rendered_chat(front, body, request)
        return await cls(chat_asked(body, chat, served), body, chat.plan).list_prompts(front, request)

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        if self._is_plain and delta.finish is None and number in self._readers:  # Nearly every event is such a one.
            return self._chunk(number, PLAIN % encode(delta.text)) if delta.text else b""
        event = b""
        if number not in self._readers:
            self._readers[number] = self._plan.reader()
            event = self._chunk(number, OPENED)
            if self._shows_ids:
                event = b'%b,"prompt_token_ids":%b%b' % self._parted(event, encode(self._prompt_ids[0]))
        reader = self._readers[number]
        events: list[Event] = [Content(delta.text)] if delta.text else []
        if reader is not None:
            events = reader.feed(delta.text)
            events += [] if delta.finish is None else reader.finish(is_cut=is_cut(delta.finish))
        made = [_message_delta(event, is_older=self._is_older) for event in events]
        pieces = [piece for piece in made if piece is not None]
        logprobs = encode(chat_logprobs(delta.tokens)) if self._body.logprobs and delta.tokens else b"null"
        ids = b',"token_ids":' + encode(self._ids(delta.tokens)["token_ids"]) if self._shows_ids else b""
        for piece in pieces or ([b'{"content":""}'] if logprobs != b"null" or (ids and delta.tokens) else []):
            inner = b'"delta":%b,"logprobs":%b,"finish_reason":null%b' % (piece, logprobs, ids)
            event += self._chunk(number, inner)
            logprobs, ids = b"null", b""  # They come once.
        if delta.finish is not None:
            num_calls = 0 if reader is None else reader.num_calls
            reason = finish_reason(delta.finish, num_calls, is_older=self._is_older)
            ends = encode(reason), encode(stop_reason(delta.finish))
            event += self._chunk(number, CLOSED + b'%b,"stop_reason":%b' % ends)
        return event if ending is None else event + self._last_chunks(ending)

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        made = self._whole([self._choice(index, choice) for index, choice in enumerate(choices)], ending)
        return made | ({"prompt_token_ids": self._prompt_ids[0]} if self._shows_ids else {})

    def _parted(self, chunk: bytes, told: bytes) -> tuple[bytes, bytes, bytes]:
        """A chunk up to the end of its choices, what is told there, and its rest."""
        return chunk.removesuffix(self._suffix) + b"}]", told, self._suffix.removeprefix(b"}]")

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = chat_message(choice.text, self._plan, is_cut=is_cut(choice.finish), is_older=self._is_older)
        num_calls = len(message.keys() & {"tool_calls", "function_call"})
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(choice.tokens) if self._body.logprobs else None,
            "finish_reason": finish_reason(choice.finish, num_calls, is_older=self._is_older),
            "stop_reason": stop_reason(choice.finish),
            **self._scored_prompt(choice),
            **self._ids(choice.tokens),
        }

    def reword(self, error: InvalidRequest) -> None:
        if isinstance(error, ContextLengthExceeded):
            error.param = "messages"


class Completions(_OpenAI[CompletionRequest]):
    """POST /v1/completions."""

    kind = chunk_kind = "text_completion"
    empty = b'"text":"","logprobs":null,"finish_reason":null'

    def __init__(self, asked: Asked, body: CompletionRequest, echoes: Sequence[str]) -> None:
        """echoes: the prompts' texts to put in front, one a prompt, or none at all."""
        super().__init__(asked, body)
        self.wants_single_tokens = body.logprobs is not None
        self._echoes = echoes
        self._offsets: dict[int, int] = {}  # It counts the characters of the tokens that are listed so far.

    @classmethod
    async def read(cls, front: AppState, body: CompletionRequest, request: Request) -> Self:
        asked = completion_asked(body, front.served())
        echoes = await or_gone(request, _prompt_texts(front, asked.requests)) if body.echo else ()
        return await cls(asked, body, echoes).list_prompts(front, request)

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        text, tokens = delta.text, delta.tokens
        if delta.prompt is not None and self._echoes:
            echo, echoed = self._echoes[number // self.asked.n], delta.prompt.tokens or ()
            text, tokens = echo + text, (*echoed, *tokens)
            self._offsets[number] = echo_offset(echo, echoed)
        logprobs = b"null"
        if self.wants_single_tokens and tokens:
            offset = self._offsets.get(number, 0)
            logprobs = encode(completion_logprobs(tokens, offset))
            self._offsets[number] = offset + sum(len(token.text) for token in tokens)
        if delta.finish is not None:
            ends = encode(finish_reason(delta.finish)), encode(stop_reason(delta.finish))
            end = b'%b,"stop_reason":%b' % ends
        elif text or logprobs != b"null" or (self._shows_ids and delta.tokens):
            end = b"null"
        else:
            return b""
        inner = b'"text":%b,"logprobs":%b,"finish_reason":%b' % (encode(text), logprobs, end)
        if self._shows_ids:
            ids = self._ids(delta.tokens)
            if delta.prompt is not None:
                ids["prompt_token_ids"] = self._prompt_ids[number // self.asked.n]
            inner += b"," + encode(ids)[1:-1]
        event = self._chunk(number, inner)
        return event if ending is None else event + self._last_chunks(ending)

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        best_of, n = self.asked.n, self._body.n
        answers: list[dict[str, Any]] = []
        for position in range(len(self.asked.requests)):
            written = choices[position * best_of : (position + 1) * best_of]
            best = written if best_of == n else sorted(written, key=Choice.mean_logprob, reverse=True)[:n]
            answers += [self._choice(len(answers) + index, choice, position) for index, choice in enumerate(best)]
        return self._whole(answers, ending)

    def _choice(self, index: int, choice: Choice, position: int) -> dict[str, Any]:
        """One choice to the prompt at `position`."""
        echo, top, logprobs = "", self._body.logprobs, None
        echoed: list[Any] = []
        if self._echoes:
            echo = self._echoes[position]
            echoed = [msgspec.structs.replace(token, top=token.top[:top]) for token in choice.prompt.tokens or ()]
        if top is not None:
            logprobs = completion_logprobs([*echoed, *choice.tokens], echo_offset(echo, echoed))
        return {
            "index": index,
            "text": echo + choice.text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(choice.finish),
            "stop_reason": stop_reason(choice.finish),
            **self._scored_prompt(choice),
            **({"prompt_token_ids": self._prompt_ids[position]} if self._shows_ids else {}),
            **self._ids(choice.tokens),
        }


async def _prompt_texts(front: AppState, requests: Sequence[GenerateRequest]) -> list[str]:
    """The prompts as text, for echo."""

    async def text(request: GenerateRequest) -> str:
        if isinstance(request.prompt, TextPrompt):
            return "".join(span.text for span in request.prompt.spans)
        return await front.engine.detokenize(request.prompt.token_ids, request.adapter)

    return list(await asyncio.gather(*map(text, requests)))
