"""What the families share: a raw prompt with sampling fields of any dialect, run as one engine request."""

from collections.abc import Mapping, Sequence
from uuid import uuid4

from fastapi import Request

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import GenerateRequest, LogprobRequest, Prompt, Span, TextPrompt, TokenPrompt
from tightrope.server.body import Body, Documented, ignored_fields, log_ignored
from tightrope.server.front import Front
from tightrope.server.openai.convert import Served
from tightrope.server.openai.routes import ERRORS
from tightrope.server.sampling_fields import KNOWN, read_sampling
from tightrope.server.work import Choice, Deltas, collect, run, started

STATUS_ERRORS: Documented = {key: ERRORS[key] for key in (401, 503)}
CALL_ERRORS: Documented = {key: ERRORS[key] for key in (400, 401, 413, 415, 503, "default")}


class TextBody(Body):
    """Base of the families' bodies: sampling fields come under any of their names."""

    read_elsewhere = KNOWN


def text_request(
    body: Body,
    fields: Mapping[str, object],
    prompt: Prompt,
    served: Served,
    *,
    max_tokens: int | None = None,
    stops: Sequence[str] = (),
    top: int | None = None,
) -> GenerateRequest:
    """The engine's request. `fields` hold the sampling, `stops` are the prompt format's, `top` alternatives are listed.

    max_tokens: where the fields name none; None is to the end of the window. Raises InvalidRequest.
    """
    asked = read_sampling(fields, served.info.vocab_size, max_tokens=max_tokens, more_stops=stops)
    if top is not None and top > served.limits.max_logprobs:
        raise InvalidRequest(f"n_probs must be at most {served.limits.max_logprobs}, not {top}", "n_probs")
    request_id = f"text-{uuid4().hex}"
    log_ignored(request_id, lambda: [*ignored_fields(body), *(name for name, _ in asked.ignored)])
    return GenerateRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=asked.params,
        stop=asked.stop,
        logprobs=None if top is None else LogprobRequest(processed=False, top=top),
    )


def text_prompt(text: str, name: str = "prompt") -> TextPrompt:
    """A raw prompt: special tokens written as text are parsed. Raises InvalidRequest for an empty one."""
    if not text:
        raise InvalidRequest(f"{name} must not be empty", name)
    return TextPrompt((Span(text),))


def token_prompt(token_ids: Sequence[int], served: Served) -> TokenPrompt:
    """Token ids as they are. Raises InvalidRequest for those outside the vocabulary, and for none at all."""
    if not token_ids:
        raise InvalidRequest("prompt must not be empty", "prompt")
    for token_id in token_ids:
        if not 0 <= token_id < served.info.vocab_size:
            raise InvalidRequest(f"prompt: {token_id} is no token id below {served.info.vocab_size}", "prompt")
    return TokenPrompt(tuple(token_ids))


async def whole(front: Front, asked: GenerateRequest, request: Request) -> Choice:
    """The answer when it is finished. Raises what the engine raises, and ClientGone."""
    (choice,) = await collect(request, run(front.metrics.generate, [asked]))
    return choice


async def pieces(front: Front, asked: GenerateRequest, request: Request) -> Deltas:
    """The answer's deltas as they come, once the engine has taken the request. Raises what it says instead."""
    return await started(request, run(front.metrics.generate, [asked]))
