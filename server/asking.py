"""From a body to what the engine is asked: in one place, for every dialect.

A dialect's reader finds its fields; what they come to is decided here. So a field that means something means it on
every route, and what changes nothing is listed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic import Field

from tightrope.backends.reuse import CacheReuse
from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import GenerateRequest, Grammar, LogprobRequest, Prompt
from tightrope.server.fields import structured
from tightrope.server.fields.lost_fields import idle_scale
from tightrope.server.fields.names import KNOWN, Bent, Ignored
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.fields.sampling import read_sampling
from tightrope.server.fields.structured import left_out, overruled, read_grammar
from tightrope.server.http.body import Body, bent_fields, log_ignored, unread_fields
from tightrope.server.http.token_ids import Ids
from tightrope.server.prompts.raw_prompts import raw_prompt
from tightrope.server.served import Served, check_model, is_named


class SharedFields(Body):
    """ReadBody that every dialect has where its sampling fields stand, which come under any of their names."""

    read_elsewhere = KNOWN | structured.NAMES

    adapter_scale: float = Field(1.0, ge=-10, le=10, description="How much of the adapter is added.")
    cache_reuse: CacheReuse = Field("moved", description="exact: the answer is over exactly computed tokens alone.")
    cache_salt: str | None = Field(None, description="Requests with different salts share no cached tokens.")
    return_progress: bool = Field(False, description="A stream tells how far its prompt has been read.")
    resumable: bool = Field(False, description="A client may come back to this stream; as the header X-Resumable: 1.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=MAX_INT, description="Keep the last n of the prompt; -1: as many as there is room for."
    )
    skip_special_tokens: bool = True

    def given(self) -> dict[str, Any]:
        """The fields of sampling and of the answer's shape that came, as they came."""
        declared = self.model_fields_set & KNOWN
        return {name: getattr(self, name) for name in declared} | (self.model_extra or {})


class AnswerBody(SharedFields):
    """What all routes that write have in common, whichever dialect they speak, but for TGI's."""

    model: str | None = Field(None, description="The served model's name, or an adapter's; may be left out.")
    explain: bool = Field(False, description="Say in the answer what was done: prompt, samplers, ignored fields.")


class TextBody(AnswerBody):
    """A raw prompt, and how to take it."""

    prompt: str | Ids
    add_bos_token: bool = Field(True, description="BOS in front of text where the model wants one.")
    add_special_tokens: bool = Field(True, description="The same; no BOS is added unless both are true.")

    def checked_prompt(self, served: Served, adapter: str | None) -> Prompt:
        """The prompt for the engine; special tokens written as text are parsed. Raises InvalidRequest."""
        return raw_prompt(self.prompt, served, adapter, add_bos=self.add_bos_token and self.add_special_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBody:
    """A body as its dialect's reader has understood it, but for the prompts."""

    body: Body
    shared: SharedFields
    given: Mapping[str, Any]  # They may come under any of their names.
    adapter: str | None
    explain: bool
    is_stream: bool = False
    max_tokens: int | None = None  # It counts where `given` names none; None is to the end of the window.
    stops: Sequence[str] = ()  # The prompt format asks for these.
    n: int = 1
    logprobs: LogprobRequest | None = None
    prompt_logprobs: int | None = None
    # It is told the grammar that `given` asks for, and returns the one to be used.
    shape: Callable[[Grammar | None], Grammar | None] | None = None
    ignored: Sequence[Ignored] = ()  # The dialect itself passes over these.
    shown_tokens: tuple[str, ...] = ()  # The dialect tells parts of an answer apart by these special tokens.
    shows_progress: bool = True  # Its streams have a place for how far a prompt has been read.
    bent: Sequence[Bent] = ()  # What the dialect itself has taken for what it plainly means.
    notes: tuple[str, ...] = ()  # They say how the prompt was made.


def common(body: AnswerBody, served: Served, *, is_openai: bool = False) -> ReadBody:
    """What is read of all bodies of this kind. Raises ModelNotFound."""
    adapter = check_model(body.model, served, is_openai=is_openai)
    bent = [] if adapter or is_named(body.model, served) else [("model", f"answered by {served.model_id}")]
    return ReadBody(body=body, shared=body, given=body.given(), adapter=adapter, explain=body.explain, bent=bent)


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request, read once: what the engine is asked, and what is said beside the answer."""

    id: str
    model: str  # An answer names the adapter, or the served model.
    requests: Sequence[GenerateRequest]  # There is one for each prompt, and they differ in their prompts alone.
    ignored: Sequence[Ignored]
    bent: Sequence[Bent]
    notes: tuple[str, ...]
    is_stream: bool
    explain: bool
    is_resumable: bool  # The body asks for a stream that its client may come back to.

    @property
    def n(self) -> int:
        """Choices to each prompt."""
        return self.requests[0].n


def refuse_log_probabilities(given: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where log probabilities are asked for and the answer would have no place for them."""
    if given.get("logprobs"):
        raise InvalidRequest("logprobs: they are given on /v1/completions and /v1/chat/completions", "logprobs")


def ask(prefix: str, prompts: Sequence[Prompt], read: ReadBody, served: Served) -> Asked:
    """What a body asks of the engine; `prefix` begins its id. Raises InvalidRequest with the name of a field."""
    made_id = f"{prefix}-{uuid4().hex}"
    sampling = read_sampling(read.given, served.info.vocab_size, max_tokens=read.max_tokens, more_stops=read.stops)
    grammar = read_grammar(read.given)
    shared = read.shared
    ignored = [
        *sampling.ignored,
        *overruled(read.given),
        *idle_scale(shared.adapter_scale, read.adapter),
        *_of_streams(read),
        *read.ignored,
    ]
    log_ignored(f"request_id={made_id}", lambda: (name for name, _ in ignored))
    if read.explain:
        ignored += unread_fields(read.body)
    requests = [
        GenerateRequest(
            request_id=made_id if len(prompts) == 1 else f"{made_id}-{position}",
            prompt=prompt,
            sampling=sampling.params,
            stop=sampling.stop,
            guidance=sampling.guidance,
            grammar=grammar if read.shape is None else read.shape(grammar),
            n=read.n,
            logprobs=read.logprobs,
            prompt_logprobs=read.prompt_logprobs,
            truncate_to=_last_tokens(shared.truncate_prompt_tokens, served),
            skip_special_tokens=shared.skip_special_tokens,
            shown_tokens=read.shown_tokens,
            cache_reuse=shared.cache_reuse,
            namespace=shared.cache_salt or "",
            adapter=read.adapter,
            adapter_scale=shared.adapter_scale,
            wants_progress=shared.return_progress and read.is_stream and read.shows_progress,
        )
        for position, prompt in enumerate(prompts)
    ]
    model = read.adapter or served.model_id
    bent = [*bent_fields(read.body), *sampling.bent, *left_out(read.given), *read.bent] if read.explain else []
    return Asked(made_id, model, requests, ignored, bent, read.notes, read.is_stream, read.explain, shared.resumable)


def _last_tokens(asked: int | None, served: Served) -> int | None:
    """How much of a prompt is kept; one token of the window is left for the answer where that is not said."""
    if asked is None or asked > 0:
        return asked
    return served.info.max_model_len - 1 if asked else None


def _of_streams(read: ReadBody) -> list[Ignored]:
    """The fields that change nothing because there is no stream, or none that has a place for it."""
    ignored: list[Ignored] = []
    if read.shared.resumable and not read.is_stream:
        ignored.append(("resumable", "the answer is no stream"))
    if read.shared.return_progress and not (read.is_stream and read.shows_progress):
        why = "comments in the stream tell it" if read.is_stream else "the answer is no stream"
        ignored.append(("return_progress", why))
    return ignored
