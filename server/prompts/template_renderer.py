"""The process that writes chats by templates, as the rest of the server sees it."""

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tightrope.engine.errors import EngineUnavailable
from tightrope.engine.process.frames import FrameTooLong, pack, receive_frame
from tightrope.processes import bare_environment, child_command
from tightrope.server.http.errors import TemplateFailed, TemplateRefused, TemplateStopped
from tightrope.server.prompts.template_worker import Rendered, RenderJob

RENDER_TIMEOUT_S = 5.0  # A long chat takes milliseconds.
START_TIMEOUT_S = 30.0  # A busy machine takes a while to start an interpreter.
MAX_PROMPT_BYTES = 16 << 20
_HALVES = re.compile("[\ud800-\udfff]")  # Halves of characters have no UTF-8.


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
        (looked,) = await self._run(RenderJob(source, ()))
        _text(looked)

    async def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The rendered text. Raises TemplateFailed with the template's own words, or what it did wrong."""
        (rendered,) = await self._run(RenderJob(source, (dict(variables),)))
        return _text(rendered)

    async def render_each(self, source: str, chats: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The texts of several chats, given by their variables, in the time of one; None where the template failed.

        Raises TemplateFailed if it had to be stopped.
        """
        return [rendered.text for rendered in await self._run(RenderJob(source, tuple(map(dict, chats))))]

    async def _run(self, job: RenderJob) -> list[Rendered]:
        async with self._lock:
            if self._process is None:
                try:
                    await self._start()
                except OSError as error:  # There was no descriptor, memory or process, or no time on a busy machine.
                    why = str(error) or "it did not answer in time"
                    raise EngineUnavailable(f"the process for chat templates can't be started: {why}") from None
            done = False
            try:
                made = await self._ask(job, self._timeout_s)
                done = True
            except TimeoutError:
                raise TemplateStopped(
                    f"the chat template was stopped after {self._timeout_s:g} s", "messages"
                ) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise TemplateStopped("the chat template was stopped: it used too much memory", "messages") from None
            finally:
                if not done:  # The client may have hung up, and what comes back now answers nobody.
                    await self._kill()
        return made

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *child_command("tightrope.server.prompts.template_worker", str(math.ceil(2 * self._timeout_s))),
            env=bare_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then closes it.
        )
        try:
            # So that its start does not count as a render's time.
            await self._ask(RenderJob("", ({},)), START_TIMEOUT_S)
        except BaseException:
            await self._kill()
            raise

    async def _ask(self, job: RenderJob, timeout_s: float) -> list[Rendered]:
        assert self._process is not None
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        async with asyncio.timeout(timeout_s):
            writer.write(pack(job.packed()))
            await writer.drain()
            try:
                made = await receive_frame(reader, MAX_PROMPT_BYTES)
            except FrameTooLong:
                raise TemplateStopped(
                    f"the chat template rendered more than {MAX_PROMPT_BYTES} bytes", "messages"
                ) from None
        return [Rendered(**fields) for fields in json.loads(made)]

    async def _kill(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        with suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        if process.stdout is not None:
            await process.stdout.read()  # `wait` would wait for ever for a pipe that nobody empties.
        await process.wait()

    async def close(self) -> None:
        """End the process."""
        async with self._lock:
            await self._kill()


def _text(rendered: Rendered) -> str:
    """Raises TemplateRefused and TemplateFailed with the reason why there is none."""
    if rendered.is_refusal:
        raise TemplateRefused(rendered.error or "the chat template refuses these messages", "messages")
    if rendered.text is None:
        raise TemplateFailed(rendered.error or "the chat template failed", "messages")
    return _HALVES.sub("\N{REPLACEMENT CHARACTER}", rendered.text)
