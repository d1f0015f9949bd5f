"""The Responses API as a dialect: an answer is a row of items, and a stream tells how each of them grows.

Source: the types of OpenAI's Python package, and OpenAI, "Streaming events" of its API reference.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from uuid import uuid4

import msgspec
from fastapi import Request

from tightrope.engine.errors import ContextLengthExceeded, EngineError, InvalidRequest
from tightrope.engine.types import Delta, Finish
from tightrope.server.answering import Dialect, Ending
from tightrope.server.asking import Asked
from tightrope.server.chats.sealed_thoughts import sealed
from tightrope.server.deltas.choices import Choice
from tightrope.server.dialects.responses.reading import ENCRYPTED, NAMES, asked, check, offer, rendered
from tightrope.server.dialects.responses.requests import ResponsesRequest
from tightrope.server.fields.logprobs import listed
from tightrope.server.fields.renaming import rename, renamed
from tightrope.server.replies.blocks import Block, BlockReader, Closed, Grown, Opened, Step
from tightrope.server.replies.form import ReplyPlan
from tightrope.server.state import AppState

encode = msgspec.json.Encoder().encode
Json = dict[str, Any]

_PREFIXES = {"thought": "rs", "text": "msg", "call": "fc"}
SUMMARY, THOUGHT = "response.reasoning_summary_text", "response.reasoning_text"


class Responses(Dialect[ResponsesRequest]):
    """POST /v1/responses."""

    def __init__(self, asked: Asked, body: ResponsesRequest, plan: ReplyPlan) -> None:
        super().__init__(asked)
        self._body = body
        self._reader = BlockReader(plan)
        self._wants_logprobs = asked.requests[0].logprobs is not None
        self.wants_single_tokens = self._wants_logprobs
        self._ids: dict[int, str] = {}  # Of items, by the indices of their blocks.
        self._num_events = 0
        self._head = _head(asked, body)

    @classmethod
    async def read(cls, front: AppState, body: ResponsesRequest, request: Request) -> Self:
        with renamed(NAMES):
            check(body, front)
            offered = offer(body)
            chat, bent = await rendered(front, body, offered, request)
            return cls(asked(front, body, offered, chat, bent), body, chat.plan)

    def reword(self, error: InvalidRequest) -> None:
        if isinstance(error, ContextLengthExceeded):
            error.param = "input"
        rename(error, NAMES)

    # ---- whole ----

    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        (choice,) = choices
        for text, tokens in choice.pieces():
            self._reader.feed(text, tokens)
        self._reader.finish(is_cut=_is_cut(choice.finish))
        return self._answer(choice.finish, ending)

    def _answer(self, finish: Finish, ending: Ending) -> Json:
        """The response as it has ended."""
        error = {"code": "server_error", "message": finish.message or "the answer failed"}
        prompt, num_thought = ending.prompts[0], self._reader.num_thought_tokens
        status = {"length": "incomplete", "error": "failed"}.get(finish.reason, "completed")
        output = [self._item(block, "completed") for block in self._reader.blocks]
        if status != "completed" and output:
            output[-1]["status"] = "incomplete"
        return {
            **self._head,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": {
                "input_tokens": prompt.num_tokens,
                "input_tokens_details": {
                    "cached_tokens": prompt.num_cached,
                    "moved_tokens": prompt.num_moved,
                    "cache_write_tokens": prompt.num_tokens - prompt.num_cached,
                },
                "output_tokens": ending.num_tokens,
                "output_tokens_details": {"reasoning_tokens": num_thought},
                "total_tokens": prompt.num_tokens + ending.num_tokens,
            },
            **ending.explained,
        }

    def _item(self, block: Block, status: str) -> Json:
        """A block as an item; one in progress is empty yet."""
        is_empty = status == "in_progress"
        if block.index not in self._ids:
            self._ids[block.index] = f"{'ctc' if block.is_custom else _PREFIXES[block.kind]}_{uuid4().hex}"
        item: Json = {"id": self._ids[block.index], "status": status}
        text = "" if is_empty else block.text
        if block.kind == "call":
            kind = {"type": "custom_tool_call" if block.is_custom else "function_call"}
            return item | kind | {"call_id": block.call_id, "name": block.name, _text_key(block): text}
        parts = [] if is_empty else [self._part(block)]
        if block.kind == "text":
            return item | {"type": "message", "role": "assistant", "content": parts}
        item |= {"type": "reasoning", "summary": []}
        item["summary" if self._body.reasoning.wants_summary else "content"] = parts
        if ENCRYPTED in self._body.include:
            item["encrypted_content"] = sealed(text)
        return item

    def _part(self, block: Block, *, is_empty: bool = False) -> Json:
        """The one part that a text or a thought has."""
        text = "" if is_empty else block.text
        if block.kind == "thought":
            return {"type": "summary_text" if self._body.reasoning.wants_summary else "reasoning_text", "text": text}
        logprobs = [] if is_empty else self._listed(block.tokens)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _listed(self, tokens: Sequence[Any]) -> list[Json]:
        return listed(tokens) if self._wants_logprobs else []

    # ---- streams ----

    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        told = self._begun()
        steps = self._reader.feed(delta.text, delta.tokens)
        if delta.finish is not None:
            steps += self._reader.finish(is_cut=_is_cut(delta.finish))
        is_cut = delta.finish is not None and delta.finish.reason in ("length", "error")
        for place, step in enumerate(steps):
            told += b"".join(self._told(step, is_cut=is_cut and place == len(steps) - 1))
        if delta.finish is not None and ending is not None:
            answer = self._answer(delta.finish, ending)
            told += self._event(f"response.{answer['status']}", response=answer)
        return told

    def failed(self, error: EngineError) -> bytes:
        fault = {"code": "server_error", "message": error.message}
        output = [self._item(block, "incomplete") for block in self._reader.blocks]
        answer = self._head | {"status": "failed", "error": fault, "output": output}
        return self._begun() + self._event("response.failed", response=answer)

    def _begun(self) -> bytes:
        """The first events, once."""
        if self._num_events:
            return b""
        return b"".join(self._event(f"response.{kind}", response=self._head) for kind in ("created", "in_progress"))

    def _event(self, kind: str, **fields: object) -> bytes:
        made = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(made))

    def _told(self, step: Step, *, is_cut: bool) -> Iterator[bytes]:
        """The events of one step."""
        block = step.block
        place = {"output_index": block.index}
        if isinstance(step, Opened):
            yield self._event("response.output_item.added", **place, item=self._item(block, "in_progress"))
            yield from self._part_event("added", block)
        elif isinstance(step, Grown):
            yield self._delta(block, step)
        elif isinstance(step, Closed):
            yield self._done(block)
            yield from self._part_event("done", block)
            item = self._item(block, "incomplete" if is_cut else "completed")
            yield self._event("response.output_item.done", **place, item=item)

    def _place(self, block: Block) -> Mapping[str, Any]:
        """Where the text of a block stands."""
        place: Json = {"item_id": self._ids[block.index], "output_index": block.index}
        if block.kind == "thought" and self._body.reasoning.wants_summary:
            return place | {"summary_index": 0}
        return place if block.kind == "call" else place | {"content_index": 0}

    def _part_event(self, end: str, block: Block) -> Iterator[bytes]:
        if block.kind == "call":
            return
        is_summary = block.kind == "thought" and self._body.reasoning.wants_summary
        kind = "response.reasoning_summary_part" if is_summary else "response.content_part"
        yield self._event(f"{kind}.{end}", **self._place(block), part=self._part(block, is_empty=end == "added"))

    def _kind(self, block: Block) -> str:
        """What the events are called that tell how a block grows."""
        if block.kind == "thought":
            return SUMMARY if self._body.reasoning.wants_summary else THOUGHT
        if block.kind == "text":
            return "response.output_text"
        return f"response.{'custom_tool_call_input' if block.is_custom else 'function_call_arguments'}"

    def _delta(self, block: Block, step: Grown) -> bytes:
        more = {"logprobs": self._listed(step.tokens)} if block.kind == "text" else {}
        return self._event(f"{self._kind(block)}.delta", **self._place(block), delta=step.text, **more)

    def _done(self, block: Block) -> bytes:
        if block.kind == "call":
            more: Json = {} if block.is_custom else {"name": block.name}
            more[_text_key(block)] = block.text
        else:
            more = {"text": block.text} | ({"logprobs": self._listed(block.tokens)} if block.kind == "text" else {})
        return self._event(f"{self._kind(block)}.done", **self._place(block), **more)


def _text_key(call: Block) -> str:
    """What the text of a call is called."""
    return "input" if call.is_custom else "arguments"


def _is_cut(finish: Finish) -> bool:
    return finish.reason in ("length", "error")


def _head(asked: Asked, body: ResponsesRequest) -> Json:
    """A response of which nothing has come, with what was asked for."""
    shape = {"type": "text"} if body.text.format is None else body.text.format.model_dump(exclude_unset=True)
    return {
        "id": asked.id.replace("-", "_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": asked.model,
        "output": [],
        "usage": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        "background": False,
        "store": False,
        "temperature": asked.requests[0].sampling.temperature,
        "text": {"format": shape},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{**tool.given, "type": tool.type or "function"} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": asked.requests[0].sampling.top_p,
        "truncation": body.truncation,
    }
