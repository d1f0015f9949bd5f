"""What the families share: a raw prompt with sampling fields of any dialect, run as one engine request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

from fastapi import Request
from pydantic import Field

from tightrope.engine.errors import BackendFailed, InvalidRequest
from tightrope.engine.types import Finish, GenerateRequest, LogprobRequest, Prompt, Span, TextPrompt, TokenPrompt
from tightrope.server.answering import Choice, collect, started
from tightrope.server.deltas.side_by_side import Deltas, run
from tightrope.server.dialects.openai.requests import AnswerBody
from tightrope.server.fields.lost_fields import idle_scale
from tightrope.server.fields.sampling import Ignored, read_sampling
from tightrope.server.fields.structured import overruled, read_grammar
from tightrope.server.http.body import log_ignored, unread_fields
from tightrope.server.http.token_ids import Ids
from tightrope.server.served import Served, check_model
from tightrope.server.state import AppState


class TextBody(AnswerBody):
    """A raw prompt, and how to take it."""

    prompt: str | Ids
    add_bos_token: bool = Field(True, description="BOS in front of text where the model wants one.")
    add_special_tokens: bool = Field(True, description="The same; no BOS is added unless both are true.")

    def checked_prompt(self, served: Served) -> Prompt:
        """The prompt for the engine; special tokens written as text are parsed. Raises InvalidRequest."""
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty", "prompt")
        if isinstance(self.prompt, str):
            return TextPrompt((Span(self.prompt),), self.add_bos_token and self.add_special_tokens)
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
    body: AnswerBody,
    fields: Mapping[str, object],
    prompt: Prompt,
    served: Served,
    *,
    max_tokens: int | None = None,
    stops: Sequence[str] = (),
    top: int | None = None,
) -> Asked:
    """What the body asks of the engine. `fields` are those of sampling and shape, `stops` the prompt format's.

    max_tokens: where the fields name none; None is to the end of the window. top: alternatives listed at each token.
    Raises InvalidRequest and ModelNotFound.
    """
    adapter = check_model(body.model, served)
    asked = read_sampling(fields, served.info.vocab_size, max_tokens=max_tokens, more_stops=stops)
    grammar = read_grammar(fields)
    if top is not None and top > served.limits.max_logprobs:
        raise InvalidRequest(f"n_probs must be at most {served.limits.max_logprobs}, not {top}", "n_probs")
    request_id = f"text-{uuid4().hex}"
    beside_others = [*asked.ignored, *overruled(fields), *idle_scale(body.adapter_scale, adapter)]
    log_ignored(f"request_id={request_id}", lambda: (name for name, _ in beside_others))
    request = GenerateRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=asked.params,
        stop=asked.stop,
        guidance=asked.guidance,
        grammar=grammar,
        logprobs=None if top is None else LogprobRequest(processed=False, top=top),
        truncate_to=body.truncate_prompt_tokens,
        skip_special_tokens=body.skip_special_tokens,
        namespace=body.cache_salt or "",
        adapter=adapter,
        adapter_scale=body.adapter_scale,
    )
    return Asked(request, [*unread_fields(body), *beside_others])


def refuse_log_probabilities(fields: Mapping[str, object]) -> None:
    """Raise InvalidRequest for a wish that an answer in a dialect without a place for them would lose."""
    if fields.get("logprobs"):
        raise InvalidRequest("logprobs: they are given on /v1/completions and /v1/chat/completions", "logprobs")


def model_name(asked: Asked, served: Served) -> str:
    """What an answer says that has written it: the adapter, or the served model."""
    return asked.request.adapter or served.model_id


def checked(finish: Finish) -> Finish:
    """The finish, in dialects without a word for a failed one. Raises BackendFailed with what went wrong."""
    if finish.reason == "error":
        raise BackendFailed(finish.message or "the answer failed")
    return finish


async def whole(front: AppState, asked: Asked, request: Request) -> Choice:
    """The answer when it is finished. Raises what the engine raises, BackendFailed for a failed one, and ClientGone."""
    (choice,) = await collect(request, run(front.generate_for(request), [asked.request]))
    checked(choice.finish)
    return choice


async def pieces(front: AppState, asked: Asked, request: Request) -> Deltas:
    """The answer's deltas as they come, once the engine has taken the request. Raises what it says instead."""
    return await started(request, run(front.generate_for(request), [asked.request]))
