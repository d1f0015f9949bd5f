"""Requests to an engine's core, and running them to their ends."""

from tightrope.backends.protocol import Backend
from tightrope.backends.reuse import CacheReuse
from tightrope.engine.core import EngineCore
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Delta, GenerateRequest, Grammar, LogprobRequest, Prompt, Span, StopRules, TextPrompt

GREEDY = SamplingParams(temperature=0.0)


def text_prompt(text: str) -> TextPrompt:
    return TextPrompt((Span(text),))


def request(
    request_id: str = "r",
    prompt: Prompt | str = "hello?",
    *,
    n: int = 1,
    logprobs: LogprobRequest | None = None,
    prompt_logprobs: int | None = None,
    reserve_tokens: int | None = None,
    truncate_to: int | None = None,
    namespace: str = "",
    sampling: SamplingParams = GREEDY,
    grammar: Grammar | None = None,
    adapter: str | None = None,
    cache_reuse: CacheReuse = "moved",
    **stop: object,
) -> GenerateRequest:
    """A request to write 20 tokens greedily; further fields are of StopRules."""
    return GenerateRequest(
        request_id,
        text_prompt(prompt) if isinstance(prompt, str) else prompt,
        sampling,
        StopRules(**{"max_tokens": 20, **stop}),  # type: ignore[arg-type]
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        reserve_tokens=reserve_tokens,
        truncate_to=truncate_to,
        namespace=namespace,
        grammar=grammar,
        adapter=adapter,
        cache_reuse=cache_reuse,
    )


def make_core(backend: Backend, **limits: object) -> EngineCore:
    return EngineCore(backend, LimitSettings(**limits))  # type: ignore[arg-type]


def run(core: EngineCore, *requests: GenerateRequest) -> dict[str, list[Delta]]:
    """Queue all at once and step until all have ended."""
    for item in requests:
        core.add(core.prepare(item))
    deltas: dict[str, list[Delta]] = {item.request_id: [] for item in requests}
    while core.has_work:
        result = core.step()
        assert not result.failed
        for delta in result.deltas:
            deltas[delta.request_id].append(delta)
    core._backend.kv.check_integrity()
    return deltas


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)
