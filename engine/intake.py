"""Requests to sequences: tokenize the prompt, check it against the window, resolve what sampling needs.

Runs beside the loop in other threads and touches nothing of it.
"""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from itertools import count

import msgspec

from tightrope.backends.protocol import KVUsage, Tokenizer
from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.guided.grammar import Grammars
from tightrope.engine.guided.grammar_trial import GrammarTrial
from tightrope.engine.prompt_bytes import check_bytes, last_bytes
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.sequence import Sequence
from tightrope.engine.track import Track
from tightrope.engine.types import GenerateRequest, Prompt, Span, TextPrompt, Written
from tightrope.engine.writer import Writer

NEGATIVE = "negative_prompt"  # A request calls it so.
SEED_STEP = 0x9E3779B97F4A7C15  # It sets the seeds of a request's choices apart.
SEED_MASK = (1 << 64) - 1
MOST_OTHERS = 2  # Vocabularies of so many adapters are laid out for grammars at a time.


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, last: int | None = None) -> list[int]:
    """Token ids of a prompt, or the last few; text gets exactly one BOS in front if the model wants one.

    Of a text only the bytes are read in which its last tokens must lie. Raises InvalidRequest for ids outside the
    vocabulary.
    """
    if not isinstance(prompt, TextPrompt):
        for token_id in prompt.token_ids:
            if not 0 <= token_id < tokenizer.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary of {tokenizer.vocab_size} tokens", "prompt"
                )
        return list(prompt.token_ids[-(last or 0) :])
    is_cut = False
    if last is not None:
        prompt, is_cut = last_bytes(prompt, tokenizer, last)
    token_ids: list[int] = []
    is_start = not is_cut
    for span in prompt.spans:
        if span.text:
            token_ids += tokenizer.encode(span.text, parse_special=span.parse_special, is_start=is_start)
            is_start = False
    bos = tokenizer.bos_id
    if prompt.add_bos and tokenizer.adds_bos and bos is not None and not is_cut:
        num_there = next((i for i, token_id in enumerate(token_ids) if token_id != bos), len(token_ids))
        token_ids[:num_there] = [bos]  # Client and template may both have written one.
    return token_ids[-(last or 0) :]


class Intake:
    """Makes sequences of requests."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        max_choices: int,
        *,
        cache: KVUsage,
        max_num_seqs: int,
        max_input_tokens: int = 0,
        tokenizer_of: Callable[[str], Tokenizer | None] = lambda adapter: None,
    ) -> None:
        """max_input_tokens: of a prompt; 0 is the window's bound. tokenizer_of: an adapter's own, if it has one."""
        self._tokenizer, self._tokenizer_of = tokenizer, tokenizer_of
        self._max_model_len = max_model_len
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_input_tokens = max_input_tokens
        self._max_choices = max_choices
        self._seq_ids = count()
        self._trial = GrammarTrial()
        self._grammars = Grammars(tokenizer, self._trial)
        self._others_lock = threading.Lock()
        self._others: list[tuple[Tokenizer, Grammars]] = []  # The last used stands last.

    def sequences(self, request: GenerateRequest, now_s: float, written: Items[Written | None] = ()) -> list[Sequence]:
        """The `n` sequences of a request; all but the first wait for the first to compute their prompt.

        written: of each choice, where another engine has begun to write them; those that have ended there get no
        sequence. Raises InvalidRequest, ContextLengthExceeded, and BackendFailed where one can't go on.
        """
        if not 1 <= request.n <= self._max_choices:
            raise InvalidRequest(f"n must be between 1 and {self._max_choices}, not {request.n}", "n")
        tokenizer = self.tokenizer(request.adapter)
        prompt = self._prompt(request, tokenizer)
        max_len = self._max_len(request, len(prompt))
        negative = self._negative_prompt(request, prompt, tokenizer)
        if negative:
            max_len = min(max_len, self._guided_len(request, len(prompt), len(negative)))
        matcher = None if request.grammar is None else self._grammars_of(tokenizer).matcher(request.grammar)
        sequences: list[Sequence] = []
        for index in range(request.n):
            before = written[index] if written else None
            if before is not None and before.is_finished:
                continue
            sequence = Sequence(
                request=request,
                tracks=tuple(Track(next(self._seq_ids), list(ids)) for ids in (prompt, negative) if ids),
                sampler=SamplerState(
                    _sampling(request.sampling, index, tokenizer),
                    prompt,
                    tokenizer.vocab_size,
                    request.logprobs,
                    None if matcher is None else matcher.fork(),
                    tokenizer.token_bytes,
                ),
                writer=Writer(request, index, tokenizer, max_len - len(prompt)),
                max_len=max_len,
                arrived_s=now_s,
                leader=sequences[0] if sequences else None,
                prompt_tokens=[] if request.prompt_logprobs is not None else None,
            )
            if before is not None:
                sequence.resume(before)
            sequences.append(sequence)
        return sequences

    def tokenizer(self, adapter: str | None) -> Tokenizer:
        """Whose tokens a request with this adapter is made of. Raises ModelNotFound."""
        return (None if adapter is None else self._tokenizer_of(adapter)) or self._tokenizer

    def is_quick(self, request: GenerateRequest) -> bool:
        """Whether only its texts take time: it has no grammar, or one that is compiled already."""
        if request.grammar is None:
            return True
        grammars = [self._grammars, *(grammars for _, grammars in self._others)]
        return any(known.knows(request.grammar) for known in grammars)

    def _grammars_of(self, tokenizer: Tokenizer) -> Grammars:
        """Over a vocabulary; those of adapters are laid out when they are first asked for."""
        if tokenizer is self._tokenizer:
            return self._grammars
        with self._others_lock:
            known = next((pair for pair in self._others if pair[0] is tokenizer), (tokenizer, None))
            grammars = known[1] or Grammars(tokenizer, self._trial)
            others = [pair for pair in self._others if pair[0] is not tokenizer]
            self._others = [*others, (tokenizer, grammars)][-MOST_OTHERS:]
            return grammars

    def _negative_prompt(self, request: GenerateRequest, prompt: list[int], tokenizer: Tokenizer) -> list[int]:
        """The token ids of the negative prompt, one at least; none where nothing is to be guided.

        No text is a BOS alone where the model begins with one, else the last token of the prompt.
        """
        guidance = request.guidance
        if guidance is None or guidance.scale == 1 or request.stop.max_tokens == 0:
            return []
        add_bos = request.prompt.add_bos if isinstance(request.prompt, TextPrompt) else True
        negative = TextPrompt((Span(guidance.text),), add_bos)
        check_bytes(negative, tokenizer, self._max_model_len, 0, NEGATIVE)
        return encode_prompt(negative, tokenizer) or prompt[-1:]

    def _guided_len(self, request: GenerateRequest, num_prompt: int, num_negative: int) -> int:
        """How long a guided sequence may become, for its negative prompt's sake. Raises InvalidRequest."""
        if self._max_num_seqs < 2:
            raise InvalidRequest(f"{NEGATIVE}: its sequence needs a second place, and --max-num-seqs is 1", NEGATIVE)
        # The cells that were taken last, by each of the two, may be empty but for one token.
        room = self._cache.capacity - 2 * (self._cache.grain - 1)
        most = min(self._max_model_len - num_negative, (room - num_prompt - num_negative) // 2)
        asked = _new_tokens(request)
        if most < asked:
            raise InvalidRequest(
                f"{NEGATIVE}: beside its {num_negative} tokens and the prompt's {num_prompt} there is room for "
                f"{max(0, most)} tokens of an answer; {asked} must fit",
                NEGATIVE,
            )
        return num_prompt + most

    def _prompt(self, request: GenerateRequest, tokenizer: Tokenizer) -> list[int]:
        last = request.truncate_to
        if isinstance(request.prompt, TextPrompt) and (last is None or last > self._max_model_len):
            check_bytes(request.prompt, tokenizer, self._max_model_len, _new_tokens(request), "prompt")
        token_ids = encode_prompt(request.prompt, tokenizer, last)
        if not token_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        return token_ids

    def _max_len(self, request: GenerateRequest, num_prompt: int) -> int:
        """How long the sequence may become. Raises ContextLengthExceeded.

        The last token is drawn but never run: it needs no place in the cache.
        """
        max_tokens = request.stop.max_tokens
        new, window = _new_tokens(request), self._max_model_len
        if request.reserve_tokens is None and new == 1:
            window += 1
        if num_prompt > self._max_model_len or num_prompt + new > window:
            raise ContextLengthExceeded(num_prompt, new, self._max_model_len)
        if num_prompt > (most := self._max_input_tokens) > 0:
            raise ContextLengthExceeded(num_prompt, new, self._max_model_len, max_input_tokens=most)
        longest = max(self._max_model_len, num_prompt + 1)
        return longest if max_tokens is None else min(longest, num_prompt + max_tokens)


def _new_tokens(request: GenerateRequest) -> int:
    """How many new tokens must fit the window: an answer ends with it, so one is enough where nobody says more."""
    if request.reserve_tokens is not None:
        return request.reserve_tokens
    return 0 if request.stop.max_tokens == 0 else 1


def _sampling(params: SamplingParams, index: int, tokenizer: Tokenizer) -> SamplingParams:
    """The params of one choice: a seed of its own, ends that are spared, no bias or ban for ids that don't exist."""
    vocab_size = tokenizer.vocab_size
    if params.xtc_spares_ends:
        spared = tuple({*params.xtc_ignore_tokens, *tokenizer.eos_ids})
        params = msgspec.structs.replace(params, xtc_ignore_tokens=spared)
    if params.seed is not None and index > 0:
        params = msgspec.structs.replace(params, seed=(params.seed + index * SEED_STEP) & SEED_MASK)
    unknown = [i for i in params.logit_bias if not 0 <= i < vocab_size]
    if unknown:
        known = {i: bias for i, bias in params.logit_bias.items() if i not in set(unknown)}
        params = msgspec.structs.replace(params, logit_bias=known)
    if any(not 0 <= i < vocab_size for i in params.banned_tokens):
        banned = tuple(i for i in params.banned_tokens if 0 <= i < vocab_size)
        params = msgspec.structs.replace(params, banned_tokens=banned)
    return params
