"""The Messages API as a dialect: an answer is a row of content blocks, and a stream tells how each of them grows.

Source: the types of Anthropic's Python package, and Anthropic, "Streaming messages" of its API reference.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import msgspec
from fastapi import Request

from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.types import Delta, Finish, PromptInfo
from tightrope.server.answering import Dialect, Ending, checked
from tightrope.server.asking import Asked
from tightrope.server.chats.sealed_thoughts import sealed, signature
from tightrope.server.deltas.choices import Choice
from tightrope.server.dialects.anthropic.bodies import MessagesRequest
from tightrope.server.dialects.anthropic.reading import NAMES, asked, offer, rendered
from tightrope.server.fields.renaming import rename, renamed
from tightrope.server.replies.blocks import Block, BlockReader, Closed, Grown, Opened, Step
from tightrope.server.replies.form import ReplyPlan
from tightrope.server.state import AppState

encode = msgspec.json.Encoder().encode
Json = dict[str, Any]

REQUEST_ID = "request-id"  # Anthropic's packages show what this header has.


class Messages(Dialect[MessagesRequest]):
    """POST /v1/messages."""

    column = "anthropic"

    def __init__(self, asked: Asked, body: MessagesRequest, plan: ReplyPlan) -> None:
        super().__init__(asked)
        self._stops = frozenset(body.stop_sequences or ())
        self._hides_thoughts = body.thinking is not None and body.thinking.display == "omitted"
        self._reader = BlockReader(plan)
        self._has_begun = False

    @classmethod
    async def read(cls, front: AppState, body: MessagesRequest, request: Request) -> Self:
        with renamed(NAMES):
            offered = offer(body)
            chat, bent = await rendered(front, body, offered, request)
            return cls(asked(front, body, offered, chat, bent), body, chat.plan)

    def reword(self, error: InvalidRequest) -> None:
        if isinstance(error, ContextLengthExceeded):  # Claude Code makes a chat shorter where it reads these words.
            error.param = "messages"
            least = "at least " if error.is_least else ""
            most = error.max_input_tokens or error.max_model_len
            error.message = f"prompt is too long: {least}{error.prompt_tokens} tokens > {most} maximum"
        rename(error, NAMES)

    def headers(self, choices: Sequence[Choice]) -> Mapping[str, str]:
        return {REQUEST_ID: self.asked.id}

    # ---- whole ----

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        is_cut = checked(choice.finish).reason == "length"
        for text, tokens in choice.pieces():
            self._reader.feed(text, tokens)
        self._reader.finish(is_cut=is_cut)
        blocks = [self._block(block) for block in self._reader.blocks]
        return {
            **self._message([made for made in blocks if made is not None]),
            **self._stop(choice.finish),
            "usage": self._usage(choice.prompt, ending.num_tokens),
            **ending.explained,
        }

    def _message(self, content: list[Json]) -> Json:
        made = {"id": self.asked.id.replace("-", "_"), "type": "message", "role": "assistant"}
        return made | {"model": self.asked.model, "content": content, "stop_reason": None, "stop_sequence": None}

    def _block(self, block: Block) -> Json | None:
        """A whole block; None for a call that was cut inside of its arguments, which have to be an object."""
        if block.kind == "text":
            return {"type": "text", "text": block.text}
        if block.kind == "thought":
            shown = "" if self._hides_thoughts else block.text
            return {"type": "thinking", "thinking": shown, "signature": self._signature(block)}
        try:
            arguments = msgspec.json.decode(block.text or "{}", type=dict[str, Any])
        except msgspec.MsgspecError:
            return None
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}

    def _signature(self, block: Block) -> str:
        return sealed(block.text) if self._hides_thoughts else signature(block.text)

    def _stop(self, finish: Finish) -> Json:
        if finish.reason == "length":
            is_bound = finish.num_tokens == self.asked.requests[0].stop.max_tokens
            return {"stop_reason": "max_tokens" if is_bound else "model_context_window_exceeded", "stop_sequence": None}
        if self._reader.num_calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if finish.reason == "stop_string" and finish.matched in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _usage(self, prompt: PromptInfo, num_written: int) -> Json:
        """Tokens that were found cached are no input tokens here: the prompt is both together."""
        return {
            "input_tokens": prompt.num_tokens - prompt.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": prompt.num_cached,
            "output_tokens": num_written,
            "output_tokens_details": {"thinking_tokens": self._reader.num_thought_tokens},
        }

    # ---- streams ----

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        told = b""
        if not self._has_begun and delta.prompt is not None:
            self._has_begun = True
            told = _event("message_start", message=self._message([]) | {"usage": self._usage(delta.prompt, 0)})
            told += _event("ping")
        steps = self._reader.feed(delta.text, delta.tokens)
        if delta.finish is not None:
            steps += self._reader.finish(is_cut=checked(delta.finish).reason == "length")
        told += b"".join(made for step in steps for made in self._told(step))
        if delta.finish is None or ending is None:
            return told
        usage = self._usage(ending.prompts[0], ending.num_tokens)
        told += _event("message_delta", delta=self._stop(delta.finish), usage=usage, **ending.explained)
        return told + _event("message_stop")

    def _told(self, step: Step) -> Iterator[bytes]:
        """The events of one step."""
        block = step.block
        if isinstance(step, Opened):
            empty: Json = {
                "thought": {"type": "thinking", "thinking": "", "signature": ""},
                "text": {"type": "text", "text": ""},
                "call": {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}},
            }
            yield _event("content_block_start", index=block.index, content_block=empty[block.kind])
        elif isinstance(step, Grown):
            name, key = {
                "thought": ("thinking_delta", "thinking"),
                "text": ("text_delta", "text"),
                "call": ("input_json_delta", "partial_json"),
            }[block.kind]
            if not (block.kind == "thought" and self._hides_thoughts):
                yield _event("content_block_delta", index=block.index, delta={"type": name, key: step.text})
        elif isinstance(step, Closed):
            if block.kind == "thought":
                signed = {"type": "signature_delta", "signature": self._signature(block)}
                yield _event("content_block_delta", index=block.index, delta=signed)
            yield _event("content_block_stop", index=block.index)


def _event(kind: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))
