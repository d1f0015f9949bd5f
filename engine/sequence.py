"""One answer being written: its tokens, how far they are computed, and when it ends."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tightrope.engine.guidance import Guide
from tightrope.engine.types import GenerateRequest, Timings, Token
from tightrope.engine.writer import Writer

if TYPE_CHECKING:  # Its module imports torch, which takes seconds, and the scheduler needs none.
    from tightrope.engine.sampler.state import SamplerState

AdapterUse = tuple[str, float] | None  # what the backend calls an adapter, and its scale


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one choice of one request. Times are seconds of the engine's clock.

    `token_ids` are prompt and output; the first `num_computed` of them are in the cache.
    """

    seq_id: int
    request: GenerateRequest
    index: int
    token_ids: list[int]
    sampler: "SamplerState"
    writer: Writer
    max_len: int  # token_ids never grows beyond it
    arrived_s: float
    guide: Guide | None = None  # runs in the same steps
    num_prompt: int = field(init=False)
    num_computed: int = 0
    num_cached: int = 0  # of the prompt, found in the cache at the first start
    leader: "Sequence | None" = None  # the choice that computes the shared prompt first
    prompt_tokens: list[Token] | None = None  # filled while prompt_logprobs are computed
    started_s: float | None = None
    first_token_s: float | None = None
    has_begun: bool = False  # whether it was in a step
    is_announced: bool = False  # whether a delta with the PromptInfo went out
    adapter: str | None = None  # what the backend calls the one that the request names

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)

    @property
    def namespace(self) -> str:
        """Whose cached tokens may be shared: keys and values depend on the adapter, and how much of it is used."""
        request = self.request
        if self.adapter is None:
            return request.namespace
        return f"{request.namespace}\0{self.adapter}\0{request.adapter_scale!r}"

    @property
    def adapter_use(self) -> AdapterUse:
        """What a step has in common where a backend can't mix adapters."""
        return None if self.adapter is None else (self.adapter, self.request.adapter_scale)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that must run before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether one step on one token gives the next one."""
        guide = self.guide
        is_guided = guide is None or (guide.num_pending == 1 and guide.num_computed > 0)
        return self.num_pending == 1 and self.num_computed > 0 and is_guided

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """What the cache knows it by: one sequence, or two."""
        return (self.seq_id,) if self.guide is None else (self.seq_id, self.guide.seq_id)

    def append(self, token_id: int) -> None:
        """Add a token of the output."""
        self.token_ids.append(token_id)
        if self.guide is not None:
            self.guide.token_ids.append(token_id)

    def take_back(self, num_tokens: int) -> None:
        """Remove the output's last tokens; how much of the rest is computed is the scheduler's to say."""
        del self.token_ids[-num_tokens:]
        if self.guide is not None:
            del self.guide.token_ids[-num_tokens:]

    def restart(self) -> None:
        """Nothing of it is in the cache any more."""
        self.num_computed = 0
        if self.guide is not None:
            self.guide.num_computed = 0

    @property
    def is_prompt_computed(self) -> bool:
        return self.num_computed >= self.num_prompt

    @property
    def needs_own_prompt(self) -> bool:
        """Whether the prompt has to be computed even where it is cached: for its logits, which are not."""
        return self.prompt_tokens is not None and not self.is_announced

    @property
    def is_reproducible(self) -> bool:
        """Whether a seed promises the same text again.

        Logits of a token that runs in another batch are rounded otherwise in their last bits. So the last token of the
        prompt runs by itself, as it does when all before it is found cached the next time.
        """
        params = self.request.sampling
        return params.seed is not None and params.temperature > 0

    def timings(self, now_s: float) -> Timings:
        started = self.started_s if self.started_s is not None else now_s
        first = self.first_token_s if self.first_token_s is not None else now_s
        return Timings(started - self.arrived_s, first - started, now_s - first)
