"""What was done with a request: prompt, BOS, reused tokens, samplers in order, fields that changed nothing."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any

from pydantic import Field

from tightrope.engine.sampler.steps import ORDERED, SamplingParams, in_order
from tightrope.engine.types import GenerateRequest, Prompt, PromptInfo, TextPrompt, Token
from tightrope.server.asking import Asked
from tightrope.server.fields.names import Bent
from tightrope.server.state import AppState

Explained = Annotated[dict[str, Any], Field(description="Absent unless asked for.")]

_OF_THE_CLIENT = "the client's own note"
_WINDOW = "the window is the server's; a prompt that does not fit is refused"
REASONS: Mapping[str, str] = {  # Clients send these without a meaning to any server, or as near misses.
    "api_type": _OF_THE_CLIENT,
    "api_server": _OF_THE_CLIENT,
    "legacy_api": _OF_THE_CLIENT,
    "truncation_length": _WINDOW,
    "num_ctx": _WINDOW,
    "n_probs": "logprobs decides here",
    "cache_prompt": "found tokens are always reused",
    "spaces_between_special_tokens": "tokens' texts are joined as they are",
    "prediction": "drafts come from the server itself",
    "num_keep": _WINDOW,
    "n_keep": _WINDOW,
    "n_discard": _WINDOW,
    "id_slot": "the server finds the cached tokens by itself",
}


def samplers(params: SamplingParams) -> list[dict[str, Any]]:
    """The steps that are not neutral, in the order in which they run; greedy decoding looks at the edits alone.

    The seed stands with each prompt, since it may have been drawn.
    """
    steps = [step for step in in_order(params) if step.is_on(params) and step.name != "seed"]
    shown = [step.params for step in steps if step.stage < ORDERED or params.temperature != 0]
    shown += [("temperature",)] if params.temperature == 0 else []
    return [{name: getattr(params, name) for name in names} for names in shown]


def _guidance(request: GenerateRequest) -> list[dict[str, Any]]:
    """What is done to the logits before all samplers."""
    guidance = request.guidance
    return [] if guidance is None else [{"guidance_scale": guidance.scale, "negative_prompt": guidance.text}]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is known before the work begins."""

    prompts: list[dict[str, Any]]
    asked: Asked
    window: int
    bent: Sequence[Bent]

    def _cut(self, infos: Sequence[PromptInfo]) -> list[Bent]:
        """Whether more tokens were asked for than there is room for."""
        room = max(1, self.window - max(info.num_tokens for info in infos))
        wanted = self.asked.requests[0].stop.max_tokens
        return [("max_tokens", f"up to the window's end: {room}")] if wanted is not None and wanted > room else []

    def told(self, infos: Sequence[PromptInfo]) -> dict[str, Any]:
        """The record, with what became of each prompt."""
        request = self.asked.requests[0]
        stop = request.stop
        return {
            "prompts": [
                prompt | {"tokens_reused": info.num_cached, "tokens_moved": info.num_moved, "seed": info.seed}
                for prompt, info in zip(self.prompts, infos, strict=True)
            ],
            "samplers": _guidance(request) + samplers(request.sampling),
            "stop": {
                "max_tokens": stop.max_tokens,
                "strings": stop.strings,
                "token_ids": stop.token_ids,
                "ignore_eos": stop.ignore_eos,
            },
            "ignored": [
                {"field": name, "why": REASONS.get(name.rpartition(".")[2], why)}
                for name, why in sorted(self.asked.ignored)
            ],
            "bent": [{"field": name, "how": how} for name, how in (*self.bent, *self.asked.bent, *self._cut(infos))],
            "notes": self.asked.notes,
        }


async def explain(front: AppState, asked: Asked, bent: Sequence[Bent] = ()) -> Explanation:
    """Begin the record of a request; bent: what was made of its JSON as a whole. Raises EngineError."""
    prompts = await asyncio.gather(*(_prompt(front, request) for request in asked.requests))
    return Explanation(list(prompts), asked, front.info().max_model_len, bent)


async def _prompt(front: AppState, request: GenerateRequest) -> dict[str, Any]:
    tokens = await front.engine.tokenize(request.prompt, request.adapter)
    shown = tokens.ids if request.truncate_to is None else tokens.ids[-request.truncate_to :]
    if isinstance(request.prompt, TextPrompt):
        text = "".join(span.text for span in request.prompt.spans)
    else:
        text = await front.engine.detokenize(request.prompt.token_ids, request.adapter)
    return {
        "text": text,
        "token_ids": shown,
        "bos": await _bos(front, request.prompt, tokens),
    }


async def _bos(front: AppState, prompt: Prompt, tokens: Iterable[Token]) -> str:
    """Who put the BOS in front, in words."""
    bos = front.info().bos_token
    if bos is None:
        return "none: the model has none"
    if not isinstance(prompt, TextPrompt):
        return "token ids are run as they are"
    written = _leading(bos, await front.engine.tokenize(TextPrompt(prompt.spans, add_bos=False)))
    kept = _leading(bos, tokens)
    if written > kept:
        return f"one: {written} stood at the start of the prompt, and one of them was kept"
    if written:
        return "one: it stands in the prompt" if written == 1 else f"{written}: they stand in the prompt"
    return "one: put in front by the server" if kept else "none: neither the model nor the prompt wants one"


def _leading(bos: str, tokens: Iterable[Token]) -> int:
    return sum(1 for _ in takewhile(lambda token: token.is_special and token.raw == bos.encode(), tokens))
