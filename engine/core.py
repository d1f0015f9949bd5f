"""The loop's one turn: schedule, run the model, draw tokens, have them written."""

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import asdict, replace

from tightrope.backends.errors import BackendError, DeviceLost, OutOfMemory
from tightrope.backends.holdings import Holdings
from tightrope.backends.protocol import Backend
from tightrope.engine.adapters import Adapters
from tightrope.engine.errors import BackendFailed, EngineError, InvalidRequest
from tightrope.engine.info import window
from tightrope.engine.intake import Intake, encode_prompt
from tightrope.engine.sampler.sampler import Sampled
from tightrope.engine.sampler.step_logits import StepLogits
from tightrope.engine.scheduler import Scheduler
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import (
    Carry,
    Delta,
    GenerateRequest,
    Prompt,
    PromptInfo,
    Stats,
    TokenPiece,
    TokenPrompt,
    TokenRun,
    Written,
)
from tightrope.engine.work import Rows, Work, layout
from tightrope.engine.writer import plain_token
from tightrope.kernels import dispatch

log = logging.getLogger("tightrope.engine")


class Counters(Struct):
    """Totals since the start; times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    moved_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought: pieces of answers, requests that failed, and how far prompts have been read.

    The deltas of `progress` come before the others.
    """

    deltas: list[Delta]
    failed: list[tuple[str, EngineError]]
    progress: Items[Delta] = ()


class EngineCore:
    """One model and its requests. `prepare`, `tokenize` and `detokenize` may run in any thread, the rest in one."""

    def __init__(
        self,
        backend: Backend,
        limits: LimitSettings,
        clock: Callable[[], float] = time.monotonic,
        adapter_paths: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """adapter_paths: of the adapters that the backend has loaded, by name."""
        self._backend = backend
        self._limits = limits
        self._clock = clock
        self._tokenizer = backend.tokenizer
        self._max_num_seqs = backend.capabilities.max_num_seqs
        self._max_model_len = window(backend)
        self._intake = Intake(
            self._tokenizer,
            self._max_model_len,
            limits.max_best_of,
            cache=backend.kv.usage(),
            max_num_seqs=self._max_num_seqs,
            max_input_tokens=limits.max_input_tokens,
            tokenizer_of=lambda adapter: self.adapters.tokenizer(adapter),
        )
        self._scheduler = Scheduler(backend.kv, backend.capabilities, limits)
        self._requests: dict[str, list[Sequence]] = {}
        self._is_deciding = False  # Who is to run; what raises meanwhile doesn't tell of whom.
        self._counters = Counters()
        self.adapters = Adapters(backend.adapters, adapter_paths)

    # ---- beside the loop ----

    def is_quick(self, request: GenerateRequest) -> bool:
        """Whether `prepare` takes no longer than the request's texts. May be called from any thread."""
        return self._intake.is_quick(request)

    def prepare(self, request: GenerateRequest, written: Items[Written | None] = ()) -> list[Sequence]:
        """Tokenize and check a request, of which another engine may have `written` something.

        Raises InvalidRequest, ContextLengthExceeded and BackendFailed.
        """
        return self._intake.sequences(request, self._clock(), written)

    def tokenize(
        self, prompt: Prompt, adapter: str | None = None, last: int | None = None, *, is_bare: bool = False
    ) -> TokenRun:
        """The tokens of a prompt, as it would be run, or the last few; without their pieces, if `is_bare`.

        Raises InvalidRequest and ModelNotFound.
        """
        tokenizer = self._intake.tokenizer(adapter)
        token_ids = encode_prompt(prompt, tokenizer, last)
        if is_bare:
            return TokenRun.bare(token_ids)
        return TokenRun.of(token_ids, lambda i: TokenPiece(tokenizer.token_bytes(i), tokenizer.is_special(i)))

    def detokenize(self, token_ids: tuple[int, ...], adapter: str | None = None) -> str:
        """The text of token ids, special ones included. Raises InvalidRequest and ModelNotFound."""
        tokenizer = self._intake.tokenizer(adapter)
        checked = encode_prompt(TokenPrompt(token_ids), tokenizer)
        return b"".join(map(tokenizer.token_bytes, checked)).decode("utf-8", "replace")

    # ---- the loop ----

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_sequences(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        return len(self._scheduler.running), len(self._scheduler.waiting)

    @property
    def suspects(self) -> list[str]:
        """Requests that may be why a call has just raised, beside those of its step: all, until it was decided upon."""
        return list(self._requests) if self._is_deciding else []

    @property
    def num_unplaced(self) -> int:
        """Answers beyond those that can run at the same time; negative: free places. May be read from any thread."""
        return sum(self.num_sequences) - self._max_num_seqs

    def add(self, sequences: list[Sequence]) -> None:
        """Queue a prepared request. Raises ModelNotFound when its adapter isn't there any more."""
        self._is_deciding = True
        adapter = sequences[0].request.adapter
        key, fingerprint = (None, "") if adapter is None else self.adapters.served(adapter)
        if sequences[0].writer.tokenizer is not self._intake.tokenizer(adapter):
            raise InvalidRequest(f"{adapter!r} was loaded anew with other tokens: ask once more", "model")
        for sequence in sequences:
            sequence.adapter, sequence.adapter_fingerprint = key, fingerprint
        self._requests[sequences[0].request.request_id] = list(sequences)
        for sequence in sequences:
            self._scheduler.add(sequence)

    def report_to(self, holdings: Holdings) -> None:
        """Tell from now on which tokens are kept."""
        self._backend.kv.report_to(holdings)

    def cancel(self, request_id: str) -> None:
        """Stop a request, wherever it is. Unknown ids are requests that have just ended."""
        if self._drop(request_id):
            self._counters.cancelled += 1

    def free_adapters(self) -> None:
        """Forget unloaded adapters that no request uses any more."""
        if self.adapters.has_leaving:
            used = {sequence.adapter for sequences in self._requests.values() for sequence in sequences}
            self._scheduler.healing.keep_adapters(used)
            self.adapters.free(used)

    def _drop(self, request_id: str, *, keep: bool = True) -> bool:
        sequences = self._requests.pop(request_id, [])
        for sequence in sequences:
            if keep:
                self._scheduler.finish(sequence)
            else:
                self._scheduler.remove(sequence, keep=False)
        return bool(sequences)

    def step(self, begun: Callable[[list[Work]], None] = lambda works: None) -> StepResult:
        """Run one step. Every waiting or running request gets further or fails; nothing is left half done.

        begun: called with what is to run once that is decided, before the model runs it. Raises DeviceLost, after which
        no step will run.
        """
        began, self._is_deciding = self._clock(), True
        works = self._scheduler.schedule(began)
        self._is_deciding = False
        begun(works)
        if not works and not self._scheduler.waiting:
            return self._heal()
        if not works:
            return self._fail(list(self._scheduler.waiting)[:1], "the prompt doesn't fit the cache")
        chunks, rows_of = layout(works)
        forward_began, compiled_s = self._clock(), dispatch.compiling.spent_s
        try:
            logits = StepLogits(self._backend.forward(chunks))
        except DeviceLost:
            raise
        except OutOfMemory as error:  # What the others have is as it was; without the newest they may fit.
            return self._fail([max((work.sequence for work in works), key=lambda s: s.arrived_s)], str(error))
        except BackendError as error:
            return self._fail([work.sequence for work in works], str(error))
        sample_began = self._clock()
        result = self._take(works, rows_of, logits, sample_began)
        ended = self._clock()
        # A kernel is compiled once: the next step of that kind takes no such time.
        self._scheduler.observe(works, ended - forward_began - (dispatch.compiling.spent_s - compiled_s))
        self._counters.steps += 1
        self._counters.step_s += ended - began
        self._counters.forward_s += sample_began - forward_began
        self._counters.sample_s += ended - sample_began
        return result

    def _heal(self) -> StepResult:
        """Compute some moved tokens again; what fails is left as it is. Raises DeviceLost."""
        chunk = self._scheduler.next_healing()
        if chunk is None:
            return StepResult([], [])
        began, compiled_s = self._clock(), dispatch.compiling.spent_s
        try:
            self._backend.forward([chunk])
        except DeviceLost:
            raise
        except BackendError as error:
            log.warning("moved tokens are left as they are: %s", error)
            self._scheduler.healing.give_up()
            return StepResult([], [])
        self._scheduler.healing.commit(chunk)
        spent_s = self._clock() - began
        self._scheduler.observe_healing(len(chunk.token_ids), spent_s - (dispatch.compiling.spent_s - compiled_s))
        self._counters.steps += 1
        self._counters.step_s += spent_s
        self._counters.forward_s += spent_s
        return StepResult([], [])

    def _fail(self, sequences: list[Sequence], why: str) -> StepResult:
        """End the requests of these sequences; nothing of them stays cached."""
        failed: list[tuple[str, EngineError]] = []
        for request_id in dict.fromkeys(s.request.request_id for s in sequences):
            self._drop(request_id, keep=False)
            failed.append((request_id, BackendFailed(why)))
        return StepResult([], failed)

    # ---- from logits to text ----

    def _take(self, works: list[Work], rows_of: list[Rows], logits: StepLogits, now_s: float) -> StepResult:
        """Commit the step, draw the next tokens [B of them], and write the deltas."""
        last_rows: list[int] = []
        drawing: list[Sequence] = []
        deltas: list[Delta] = []
        progress: list[Delta] = []
        for work, (own, *others) in zip(works, rows_of, strict=True):
            sequence = work.sequence
            if work.is_scored and own.stop > own.start:
                self._score_prompt(sequence, logits, own)
            self._scheduler.commit(work)
            is_decode = work.shares is sequence.one_each
            sequence.steps.add(work.shares, is_alone=len(works) == 1, is_decode=is_decode)
            if sequence.tells_progress(work.num_run, is_last=work.is_last):
                progress.append(sequence.progress(now_s))
            if not work.is_last:
                continue
            if sequence.request.stop.max_tokens == 0:
                deltas += self._completed(sequence, sequence.writer.end("length"), now_s)
                continue
            last_rows.append(own.stop - 1)
            drawing.append(sequence)
            for negative in others:
                assert sequence.request.guidance is not None
                logits.guide(own.stop - 1, negative.start, sequence.request.guidance.scale)
        if drawing:
            for sequence in drawing:
                sequence.sampler.suppressed = sequence.writer.excluded()
            drawn_tokens = logits.draw(last_rows, [s.sampler for s in drawing])
            for sequence, drawn in zip(drawing, drawn_tokens, strict=True):
                deltas += self._advance(sequence, drawn, now_s)
        return StepResult(deltas, [], progress)

    def _advance(self, sequence: Sequence, drawn: Sampled | None, now_s: float) -> list[Delta]:
        """Append the drawn token, and follow the writer where it takes tokens back or ends the answer."""
        writer, sampler = sequence.writer, sequence.sampler
        if drawn is None:
            message = "no token can be drawn: all are banned, or the model gave no numbers"
            if sampler.grammar is not None and sampler.grammar.error is not None:
                message = f"the grammar can't be followed any further: {sampler.grammar.error}"
            return self._completed(sequence, writer.end("error", message=message), now_s)
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        sequence.append(drawn.token_id)
        sampler.append(drawn.token_id, drawn.surprise)
        self._counters.generated_tokens += 1
        deltas = writer.take(drawn.token_id, drawn.logprob, drawn.top, is_complete=sampler.has_complete_text)
        num_lost = sequence.num_output - writer.num_tokens
        if num_lost:
            sequence.take_back(num_lost)
            sampler.truncate(writer.num_tokens)
            if not writer.is_finished:
                self._scheduler.rewind(sequence)
        return self._completed(sequence, deltas, now_s)

    def _completed(self, sequence: Sequence, deltas: list[Delta], now_s: float) -> list[Delta]:
        """The same with what the writer can't know: how the prompt was read, and how long all took."""
        if not sequence.is_announced:
            deltas[0] = replace(deltas[0], prompt=self._announce(sequence))
        sequence.num_given += sum(len(delta.tokens) for delta in deltas)
        layout, mu = sequence.steps.news(), sequence.sampler.mu_behind(sequence.num_given)
        if layout is not None or mu is not None:
            deltas[-1] = replace(deltas[-1], carry=Carry(mu, layout))
        if (finish := deltas[-1].finish) is not None:
            deltas[-1] = replace(deltas[-1], finish=replace(finish, timings=sequence.timings(now_s)))
            self._leave(sequence)
        return deltas

    def _announce(self, sequence: Sequence) -> PromptInfo:
        sequence.is_announced = True
        self._counters.prompt_tokens += sequence.num_prompt
        self._counters.cached_tokens += sequence.num_cached
        self._counters.moved_tokens += sequence.num_moved
        scored = None if sequence.prompt_tokens is None else tuple(sequence.prompt_tokens)
        return PromptInfo(
            sequence.num_prompt, sequence.num_cached, sequence.sampler.seed, scored, num_moved=sequence.num_moved
        )

    def _leave(self, sequence: Sequence) -> None:
        """Give the place of a finished sequence back."""
        self._scheduler.finish(sequence)
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
            self._counters.finished += 1

    def _score_prompt(self, sequence: Sequence, logits: StepLogits, rows: slice) -> None:
        """Logprobs of the prompt's tokens behind the first that runs, from the rows of the tokens before them."""
        tokens, top, tokenizer = sequence.prompt_tokens, sequence.request.prompt_logprobs, sequence.writer.tokenizer
        assert tokens is not None
        assert top is not None
        token_ids, start = sequence.own.token_ids, sequence.own.pending.ranges[0].start
        if start == 0:
            tokens.append(plain_token(token_ids[0], tokenizer))
        following = token_ids[start + 1 : min(start + 1 + rows.stop - rows.start, sequence.num_prompt)]
        for scored in logits.scores(rows, following, top):
            tokens.append(plain_token(scored.token_id, tokenizer, scored.logprob, scored.top))

    def stats(self) -> Stats:
        """Gauges and counters now."""
        usage, (num_running, num_waiting) = self._backend.kv.usage(), self.num_sequences
        return Stats(
            num_running=num_running,
            num_waiting=num_waiting,
            cache_used=usage.used,
            cache_reusable=usage.reusable,
            cache_capacity=usage.capacity,
            preemptions=self._scheduler.preemptions,
            healed_tokens=self._scheduler.healing.num_tokens,
            **asdict(self._counters),
        )
