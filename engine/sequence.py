"""One answer being written: its tracks, what it is drawn and written by, and what became of it so far."""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tightrope.backends.reuse import Wanted
from tightrope.engine.layout import Replay, Steps
from tightrope.engine.track import Shares, Track
from tightrope.engine.types import Delta, GenerateRequest, PromptRead, Timings, Token, Written, cache_namespace
from tightrope.engine.writer import Writer

if TYPE_CHECKING:  # Its module imports torch, which takes seconds, and the scheduler needs none.
    from tightrope.engine.sampler.state import SamplerState

PROGRESS_TOKENS = 64  # A prompt that is read token by token is told of each time that so many are left.

AdapterUse = tuple[str, float] | None  # The backend calls an adapter so, and uses it at this scale.


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one choice of one request. Times are seconds of the engine's clock.

    `tracks` hold a prompt and the output each. The first is the answer's `own`, and a token is drawn from its logits;
    those of the others, such as the negative prompt's, are computed in the same steps to lead it.
    """

    request: GenerateRequest
    tracks: tuple[Track, ...]
    sampler: "SamplerState"
    writer: Writer
    max_len: int  # Its own track has at most so many tokens.
    arrived_s: float
    own: Track = field(init=False)
    one_each: Shares = field(init=False)  # In a step it runs this while it writes.
    num_prompt: int = field(init=False)  # It counts tokens of its own.
    num_cached: int = 0  # So many of the prompt's tokens were found in the cache at the first start,
    num_moved: int = 0  # and so many of these had been moved there, or computed over such.
    leader: "Sequence | None" = None  # This choice computes the shared prompt first.
    prompt_tokens: list[Token] | None = None  # They are filled while prompt_logprobs are computed.
    started_s: float | None = None
    first_token_s: float | None = None
    has_begun: bool = False  # It was in a step.
    is_announced: bool = False  # A delta with the PromptInfo went out.
    adapter: str | None = None  # The backend calls the one that the request names so.
    adapter_fingerprint: str = ""  # It tells which of all adapters that is, also in another process.
    steps: Steps = field(init=False)
    replay: Replay | None = None  # Another engine had begun it, and its text is to go on as there.
    num_given: int = 0  # So many tokens of the output have been given out.

    def __post_init__(self) -> None:
        self.own = self.tracks[0]
        self.one_each = [(track, 1) for track in self.tracks]
        self.num_prompt = len(self.own.token_ids)
        self.steps = Steps(self.tracks, is_exact=self.is_same_each_time)

    @property
    def namespace(self) -> str:
        """See cache_namespace."""
        request = self.request
        return cache_namespace(request.namespace, request.adapter, self.adapter_fingerprint, request.adapter_scale)

    @property
    def adapter_use(self) -> AdapterUse:
        """What a step has in common where a backend can't mix adapters."""
        return None if self.adapter is None else (self.adapter, self.request.adapter_scale)

    @property
    def num_output(self) -> int:
        return len(self.own.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens of all tracks that must run before the next one can be drawn."""
        return sum(track.pending.count for track in self.tracks)

    @property
    def is_decoding(self) -> bool:
        """Whether one step on one token of each track gives the next one."""
        is_ready = True
        for track in self.tracks:
            is_ready = is_ready and track.pending.count == 1 < len(track.token_ids)
        return is_ready

    def tells_progress(self, num_run: int, *, is_last: bool) -> bool:
        """Whether a step that has run so many of its tokens is worth a word: see PromptRead."""
        if is_last:
            return self.request.wants_progress and not self.is_announced and self.leader is None
        return num_run > len(self.tracks) or self.own.pending.count % PROGRESS_TOKENS == 0

    def progress(self, now_s: float) -> Delta:
        """How far it has been read."""
        num_tokens, began_s = len(self.own.token_ids), now_s if self.started_s is None else self.started_s
        read = PromptRead(num_tokens, self.num_cached, num_tokens - self.own.pending.count, now_s - began_s)
        return Delta(self.request.request_id, self.writer.index, "", (), read=read)

    def append(self, token_id: int) -> None:
        """Add a token of the output."""
        for track in self.tracks:
            track.append(token_id)

    def take_back(self, num_tokens: int) -> None:
        """Remove the output's last tokens; the cache follows by Scheduler.rewind."""
        for track in self.tracks:
            track.take_back(num_tokens)

    @property
    def is_prompt_computed(self) -> bool:
        return not self.own.pending.has_before(self.num_prompt)

    @property
    def needs_own_prompt(self) -> bool:
        """Whether the prompt has to be computed even where it is cached: for its logits, which are not."""
        return self.prompt_tokens is not None and not self.is_announced

    def wanted(self, track: Track) -> Wanted:
        """What the cache may find for a track. What a seed promises, and log probabilities, are of exact tokens."""
        if track is self.own and self.needs_own_prompt:
            return "nothing"
        request = self.request
        if request.sampling.seed is not None or request.prompt_logprobs is not None or self.replay is not None:
            return "exact"
        return request.cache_reuse

    def resume(self, written: Written) -> None:
        """Go on behind what another engine has given out. Raises BackendFailed where that can't be."""
        token_ids = array("i", written.token_ids).tolist()
        self.sampler.resume(token_ids, written.seed, written.mu)
        self.writer.replay(token_ids)
        for token_id in token_ids:
            self.append(token_id)
        self.num_given = len(token_ids)
        self.is_announced = True
        self.replay = Replay(written.layout) if written.layout.is_exact else None

    @property
    def is_greedy(self) -> bool:
        return self.request.sampling.temperature == 0

    @property
    def is_same_each_time(self) -> bool:
        """Whether the request alone decides the text: it is greedy, or has a seed."""
        return self.is_greedy or self.request.sampling.seed is not None

    @property
    def is_reproducible(self) -> bool:
        """Whether a seed promises the same text again.

        Logits of a token that runs in another batch are rounded otherwise in their last bits. So the last token of the
        prompt runs by itself, as it does when all before it is found cached the next time.
        """
        return self.is_same_each_time and not self.is_greedy

    def timings(self, now_s: float) -> Timings:
        started = self.started_s if self.started_s is not None else now_s
        first = self.first_token_s if self.first_token_s is not None else now_s
        return Timings(started - self.arrived_s, first - started, now_s - first)
