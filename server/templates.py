"""Chat messages to prompt text, by the Jinja template from the model's files."""

import asyncio
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from tightrope.engine.types import ModelInfo, Span
from tightrope.server.builtin_templates import CHATML, PROMPT_FORMATS, PromptFormat
from tightrope.server.errors import TemplateFailed, TemplateRefused
from tightrope.server.role_order import Message, regular_orders
from tightrope.server.template_worker import Rendered, RenderJob

RENDER_TIMEOUT_S = 5.0  # a long chat takes milliseconds
START_TIMEOUT_S = 30.0  # a busy machine takes a while to start an interpreter
MAX_PROMPT_BYTES = 16 << 20

# Marks around special-token texts in what people wrote, and at the place where an answer goes on. They are private-use
# characters; those that come in from outside are removed first, so every mark in the rendered prompt is ours.
OPEN, CLOSE, GO_ON = "\ue0f0", "\ue0f1", "\ue0f2"
_NO_MARKS = str.maketrans("", "", OPEN + CLOSE + GO_ON)


class TemplateRenderer:
    """Renders in a process of its own, which is killed when a template takes too long and started again when needed.

    It starts with the first chat. One template renders at a time.
    """

    def __init__(self, timeout_s: float = RENDER_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def check(self, source: str) -> None:
        """Raise TemplateFailed if the template names what no template may reach, whichever messages it would see."""
        await self._run(source, None)

    async def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The rendered text. Raises TemplateFailed with the template's own words, or what it did wrong."""
        return await self._run(source, dict(variables))

    async def _run(self, source: str, variables: dict[str, Any] | None) -> str:
        async with self._lock:
            if self._process is None:
                await self._start()
            done = False
            try:
                rendered = await self._ask(RenderJob(source, variables), self._timeout_s)
                done = True
            except TimeoutError:
                raise TemplateFailed(f"the chat template was stopped after {self._timeout_s:g} s", "messages") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise TemplateFailed("the chat template was stopped: it used too much memory", "messages") from None
            finally:
                if not done:  # also when the client hung up: what comes back now answers nobody
                    await self._kill()
        if rendered.is_refusal:
            raise TemplateRefused(rendered.error or "the chat template refuses these messages", "messages")
        if rendered.text is None:
            raise TemplateFailed(rendered.error or "the chat template failed", "messages")
        return rendered.text

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tightrope.server.template_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then closes it
        )
        try:
            await self._ask(RenderJob("", {}), START_TIMEOUT_S)  # so that its start does not count as a render's time
        except BaseException:
            await self._kill()
            raise

    async def _ask(self, job: RenderJob, timeout_s: float) -> Rendered:
        assert self._process is not None
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        frame = msgspec.msgpack.encode(job)
        async with asyncio.timeout(timeout_s):
            writer.write(len(frame).to_bytes(4, "little") + frame)
            await writer.drain()
            num_bytes = int.from_bytes(await reader.readexactly(4), "little")
            if num_bytes > MAX_PROMPT_BYTES:
                raise TemplateFailed(f"the chat template rendered more than {MAX_PROMPT_BYTES} bytes", "messages")
            return msgspec.msgpack.decode(await reader.readexactly(num_bytes), type=Rendered)

    async def _kill(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        with suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        if process.stdout is not None:
            await process.stdout.read()  # `wait` would wait for ever for a pipe that nobody empties
        await process.wait()

    async def close(self) -> None:
        """End the process."""
        async with self._lock:
            await self._kill()


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as one prompt; `notes` say what was done to its messages that nobody asked for."""

    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """The template of the served model, and what its special tokens look like.

    `chosen` is the name of a built-in format or a Jinja source, and wins over the model's own; `variables` are the
    server's, beneath those of a request.
    """

    def __init__(self, info: ModelInfo, chosen: str | None = None, variables: Mapping[str, str] | None = None) -> None:
        own = CHATML if info.chat_template is None else PromptFormat(info.chat_template)
        in_use = own if chosen is None else PROMPT_FORMATS.get(chosen, PromptFormat(chosen))
        self.source = in_use.source
        self.stops = in_use.stops
        self._info = info
        self._variables = dict(variables or {})

    async def render(
        self,
        renderer: TemplateRenderer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> RenderedPrompt:
        """The prompt. What people wrote stays plain text, even if it looks like a special token.

        `variables` are the request's own, beneath the fixed ones. With continue_final_message the text ends inside the
        last message. A chat that the template refuses, or of whose system messages it leaves one out, is tried in
        stricter orders of its roles. Raises TemplateFailed, for a refusal with the template's words on the chat as it
        came.
        """
        marked = [_mapped(message, self._mark) for message in messages]
        if continue_final_message:
            marked[-1] = marked[-1] | {"content": f"{marked[-1].get('content') or ''}{GO_ON}"}
        fixed = {
            "tools": [_mapped(tool, self._mark) for tool in tools] or None,
            "documents": None,
            **self._variables,
            **(variables or {}),
            "bos_token": self._info.bos_token or "",
            "eos_token": self._info.eos_token or "",
            **dict(self._info.named_tokens),
            "add_generation_prompt": add_generation_prompt,
        }
        text, notes = await _render_ordered(renderer, self.source, marked, fixed)
        if continue_final_message:
            text, mark, _ = text.rpartition(GO_ON)
            if not mark:
                raise TemplateFailed("the chat template leaves out the message to be continued", "messages")
        return RenderedPrompt(spans(text), notes)

    def _mark(self, text: str) -> str:
        special = special_pattern(self._info.special_texts)
        text = text.translate(_NO_MARKS)
        return special.sub(rf"{OPEN}\g<0>{CLOSE}", text) if special else text


async def _render_ordered(
    renderer: TemplateRenderer, source: str, messages: list[Message], variables: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """The text of the chat, in the first order of roles that the template takes whole, and notes."""
    first: str | None = None
    try:
        first = await renderer.render(source, {**variables, "messages": messages})
        refusal = TemplateRefused("the chat template leaves out a system message", "messages")
        if not _loses_system(messages, first):
            return first, ()
    except TemplateRefused as exc:
        refusal = exc
    for order in regular_orders(messages):
        try:
            text = await renderer.render(source, {**variables, "messages": order})
        except TemplateRefused:
            continue
        if first is None or not _loses_system(order, text):
            return text, (f"messages were merged into {len(order)} turns: {refusal.message}",)
    if first is None:
        raise refusal
    return first, (refusal.message,)


def _loses_system(messages: Sequence[Message], text: str) -> bool:
    """Whether a system message is nowhere in the text: many templates take one at the start alone."""
    return any(m["role"] == "system" and m["content"].strip() not in text for m in messages)


@lru_cache(maxsize=4)
def special_pattern(special_texts: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds special-token texts, the longest of several. White space alone is text in every chat."""
    texts = sorted({text for text in special_texts if text.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _mapped(message: Mapping[str, Any], change: Callable[[str], str]) -> Message:
    return {name: _map_texts(item, change, name) for name, item in message.items()}


def _map_texts(value: object, change: Callable[[str], str], key: str = "") -> object:
    """Change every text in a message but those that the template compares: role and type."""
    if isinstance(value, str):
        return value if key in ("role", "type") else change(value)
    if isinstance(value, dict):
        return {name: _map_texts(item, change, name) for name, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value


def spans(rendered: str) -> tuple[Span, ...]:
    """Cut a rendered prompt at its marks.

    A marked text is plain only while both marks still enclose it: a template that cuts messages into pieces (at
    "</think>", say) may have torn them apart, and then the marks alone disappear.
    """
    pieces: list[Span] = []
    for index, piece in enumerate(re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}", rendered)):
        is_plain = index % 2 == 1
        text = piece.translate(_NO_MARKS)
        if text:
            pieces.append(Span(text, parse_special=not is_plain))
    return tuple(pieces)
