"""What the families share: a raw prompt with sampling fields of any dialect, run as one engine request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

from fastapi import Request
from pydantic import Field

from tightrope.engine.errors import BackendFailed, InvalidRequest
from tightrope.engine.types import Finish, GenerateRequest, LogprobRequest, Prompt, Span, TextPrompt, TokenPrompt
from tightrope.server import structured
from tightrope.server.body import Body, Documented, log_ignored, unread_fields
from tightrope.server.front import Front
from tightrope.server.openai.convert import Served
from tightrope.server.openai.requests import Ids
from tightrope.server.openai.routes import ERRORS
from tightrope.server.sampling_fields import KNOWN, Ignored, read_sampling
from tightrope.server.structured import overruled, read_grammar
from tightrope.server.work import Choice, Deltas, collect, run, started

STATUS_ERRORS: Documented = {key: ERRORS[key] for key in (401, 503)}
CALL_ERRORS: Documented = {key: ERRORS[key] for key in (400, 401, 413, 415, 503, "default")}


class SamplingFields(Body):
    """How to draw and what the answer must look like, under any of the names that clients have for it."""

    read_elsewhere = KNOWN | structured.NAMES


class TextBody(SamplingFields):
    """A raw prompt, and how to take it."""

    prompt: str | Ids
    add_bos_token: bool = Field(True, description="BOS in front of text where the model wants one.")
    explain: bool = Field(False, description="Say in the answer what was done: prompt, samplers, ignored fields.")
    skip_special_tokens: bool = True

    def checked_prompt(self, served: Served) -> Prompt:
        """The prompt for the engine; special tokens written as text are parsed. Raises InvalidRequest."""
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty", "prompt")
        if isinstance(self.prompt, str):
            return TextPrompt((Span(self.prompt),), self.add_bos_token)
        for token_id in self.prompt:
            if not 0 <= token_id < served.info.vocab_size:
                raise InvalidRequest(f"prompt: {token_id} is no token id below {served.info.vocab_size}", "prompt")
        return TokenPrompt(tuple(self.prompt))


@dataclass(frozen=True, slots=True)
class Asked:
    """The engine's request, and the fields of its body that change nothing."""

    request: GenerateRequest
    ignored: list[Ignored]


def text_request(
    body: Body,
    fields: Mapping[str, object],
    prompt: Prompt,
    served: Served,
    *,
    max_tokens: int | None = None,
    stops: Sequence[str] = (),
    top: int | None = None,
    skip_special_tokens: bool = True,
) -> Asked:
    """What the body asks of the engine. `fields` are those of SamplingFields, `stops` the prompt format's.

    max_tokens: where the fields name none; None is to the end of the window. top: alternatives listed at each token.
    Raises InvalidRequest.
    """
    asked = read_sampling(fields, served.info.vocab_size, max_tokens=max_tokens, more_stops=stops)
    grammar = read_grammar(fields)
    if top is not None and top > served.limits.max_logprobs:
        raise InvalidRequest(f"n_probs must be at most {served.limits.max_logprobs}, not {top}", "n_probs")
    request_id = f"text-{uuid4().hex}"
    ignored = [*((name.removeprefix("options."), why) for name, why in unread_fields(body)), *asked.ignored]
    ignored += overruled(fields)
    log_ignored(request_id, lambda: (name for name, _ in ignored))
    request = GenerateRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=asked.params,
        stop=asked.stop,
        guidance=asked.guidance,
        grammar=grammar,
        logprobs=None if top is None else LogprobRequest(processed=False, top=top),
        skip_special_tokens=skip_special_tokens,
    )
    return Asked(request, ignored)


def checked(finish: Finish) -> Finish:
    """The finish, in dialects without a word for a failed one. Raises BackendFailed with what went wrong."""
    if finish.reason == "error":
        raise BackendFailed(finish.message or "the answer failed")
    return finish


async def whole(front: Front, asked: Asked, request: Request) -> Choice:
    """The answer when it is finished. Raises what the engine raises, BackendFailed for a failed one, and ClientGone."""
    (choice,) = await collect(request, run(front.metrics.generate, [asked.request]))
    checked(choice.finish)
    return choice


async def pieces(front: Front, asked: Asked, request: Request) -> Deltas:
    """The answer's deltas as they come, once the engine has taken the request. Raises what it says instead."""
    return await started(request, run(front.metrics.generate, [asked.request]))
