"""Grammars: what an answer may look like, as a mask over the vocabulary for each step.

The library is llguidance: it refuses JSON-schema keywords that it can't enforce, and a `oneOf` that it can't prove
disjoint, where the rule here is that nothing is loosened in silence. It needs no other package, and what its masks cost
is measured by bench/grammar.py. Behind it is an Earley parser over derivatives of regular expressions, with limits on
what a step may cost, so that no pattern backtracks; where a grammar forces a text, the masks follow the model's own way
of tokenizing it.

White space between the parts of JSON is one blank, or a newline and an indentation: a model that is unsure would
otherwise write blanks to the end of the window. The compact form has none.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from tightrope.backends.protocol import Tokenizer
from tightrope.engine.errors import EngineUnavailable, InvalidRequest
from tightrope.engine.guided.grammar_text import lark_of, without_special
from tightrope.engine.guided.grammar_trial import GrammarTrial, compiled
from tightrope.engine.guided.json_schema import ALLOWED, MAX_BYTES, layout, schema_fault, without_idle
from tightrope.engine.guided.regex_limits import repeat_fault
from tightrope.engine.types import Grammar

Packed = NDArray[np.uint8]  # [>= V / 8]: one bit a token, the lowest first; 1 is allowed

NUM_KEPT = 16  # So many of earlier requests are kept: those of one client are mostly the same.


class Matcher:
    """Where one answer stands in its grammar. Follows the output token by token."""

    def __init__(self, native: LLMatcher, num_words: int) -> None:
        """num_words: of 32 tokens each, in a mask."""
        self.native = native
        self.num_words = num_words
        self.num_tokens = 0

    def fork(self) -> "Matcher":
        """One more at the same place, with a life of its own."""
        other = Matcher(self.native.deep_copy(), self.num_words)
        other.num_tokens = self.num_tokens
        return other

    def append(self, token_id: int) -> None:
        """A token was drawn. One that the mask excludes is an error, after which the mask excludes all."""
        self.num_tokens += 1
        self.native.consume_token(token_id)

    def truncate(self, num_tokens: int) -> None:
        """Go back to where the first `num_tokens` had been drawn."""
        self.native.rollback(self.num_tokens - num_tokens)
        self.num_tokens = num_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the text is what the grammar wants, and nothing can be added to it."""
        return self.native.is_stopped() and not self.native.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar can't go on: one line, mostly a limit on what one step may cost."""
        return _one_line(self.native.get_error()) if self.native.is_error() else None


def masks(matchers: Sequence[Matcher]) -> list[Packed]:
    """The tokens that may come next: end tokens only where the text is complete, none after an error.

    Of several matchers at the same time, on all cores.
    """
    words = np.zeros((len(matchers), max((matcher.num_words for matcher in matchers), default=0)), np.int32)
    able = [(place, matcher) for place, matcher in enumerate(matchers) if not matcher.native.is_error()]
    for num_words in {matcher.num_words for _, matcher in able}:  # Vocabularies of adapters may be larger.
        places = [place for place, matcher in able if matcher.num_words == num_words]
        natives = [matchers[place].native for place in places]
        found = np.zeros((len(places), num_words), np.int32)
        if len(natives) == 1:
            fill_next_token_bitmask(natives[0], found)
        else:
            fill_next_token_bitmask_par(_executor(), [(native, line) for line, native in enumerate(natives)], found)
        words[places, :num_words] = found
    for place, matcher in able:
        if matcher.native.is_error():
            words[place] = 0
    return list(words.view(np.uint8))


@cache
def _executor() -> LLExecutor:
    """The threads that compute masks, as many as there are cores for this process."""
    return LLExecutor(len(os.sched_getaffinity(0)))


class Grammars:
    """Compiles requests' grammars over one vocabulary. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer, trial: GrammarTrial | None = None) -> None:
        """Lays out the vocabulary, in 0.2 s of 49,152 tokens and 2 s of 262,144. trial: of every grammar before it is
        compiled here.

        No other thread of Python runs meanwhile, so it is done before there are any requests.
        """
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = threading.Lock()
        self._trial = trial
        self._vocabulary = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer)), tokenizer.vocab_size, sorted(tokenizer.eos_ids) or None
        )

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of the grammar.

        Raises InvalidRequest with the field's name and the reason when the grammar is malformed, too large, can't be
        enforced whole, or allows no text at all.
        """
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher  # The last used stands last.
            if len(self._compiled) > NUM_KEPT:
                self._compiled.popitem(last=False)
            return matcher.fork()

    def knows(self, grammar: Grammar) -> bool:
        """Whether a matcher is to be had at once."""
        return grammar in self._compiled

    def _compile(self, grammar: Grammar) -> Matcher:
        try:
            source = native_grammar(grammar)
        except ValueError as error:
            raise InvalidRequest(f"{grammar.field}: {_one_line(str(error))}", grammar.field) from None
        self._try(grammar)
        native = compiled(self._vocabulary, source)
        if native.is_error():
            raise InvalidRequest(f"{grammar.field}: {_reason(native.get_error())}", grammar.field)
        native.reset()
        return Matcher(native, -(-self._vocabulary.vocab_size // 32))

    def _try(self, grammar: Grammar) -> None:
        if self._trial is None:
            return
        source = native_grammar(grammar, without_special)
        try:
            passes = self._trial.passes(source)
        except OSError as error:
            raise EngineUnavailable(f"the process that tries grammars can't be started: {error}") from None
        if not passes:
            raise InvalidRequest(f"{grammar.field}: it takes too long, or too much memory, to compile", grammar.field)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_ids, default=None)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]

    def __call__(self, text: bytes) -> list[int]:
        """The model's own tokens of a text that the grammar forces."""
        return self._tokenizer.encode(text.decode(), parse_special=False, is_start=False)


def native_grammar(grammar: Grammar, edited: Callable[[str], str] = str) -> str:
    """A request's grammar in llguidance's form, its Lark `edited`. Raises ValueError with what is wrong with it."""
    source = _native_text(grammar, edited)
    if not grammar.frame:
        return source
    is_lark = grammar.kind in ("grammar", "lark")
    answer = {"lark_grammar": source} if is_lark else json.loads(source)["grammars"][0]
    return json.dumps({"grammars": [{"lark_grammar": edited(grammar.frame)}, {**answer, "name": "answer"}]})


def _native_text(grammar: Grammar, edited: Callable[[str], str]) -> str:
    if len(grammar.text) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                _checked_schema(grammar.text),
                overrides={**layout(is_compact=grammar.is_compact), "lenient": False, "coerce_one_of": False},  # type: ignore[arg-type]  # of a TypedDict
            )
        case "regex":
            if (fault := repeat_fault(grammar.text)) is not None:
                raise ValueError(fault)
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_regex(
                "|".join(map(re.escape, msgspec.json.decode(grammar.text, type=list[str])))
            )
        case "grammar":
            return LLMatcher.grammar_from_lark(edited(lark_of(grammar.text)))
        case "lark":
            return LLMatcher.grammar_from_lark(edited(grammar.text))


def _checked_schema(text: str) -> str:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"the schema is no JSON: {error}") from None
    if (fault := schema_fault(schema)) is not None:
        raise ValueError(fault)
    return json.dumps({} if schema is True else without_idle(schema))


_EXCERPT = re.compile(r"\s*(?:\d+ \|.*|\^+\s*)")  # The library shows the grammar, which is of our own making, so.
_PLACE = re.compile(r"at \d+\(\d+\): (?:failed to compile JSON schema: )?")


def _reason(error: str) -> str:
    """The library's reason without its view of the grammar."""
    if error.startswith("NoExtension"):
        return "no text satisfies it"
    if "coerce_one_of" in error:
        return f"the alternatives of a oneOf may overlap, which can't be enforced; {ALLOWED}"
    lines = [line for line in error.splitlines() if not _EXCERPT.fullmatch(line)]
    told = [line for line in lines if line.startswith("error: ")]  # Behind an excerpt of a regular expression.
    return _one_line(_PLACE.sub("", (told or lines or [error])[0]))


def _one_line(text: str) -> str:
    """The library's words, without its excerpts of the grammar and its traces."""
    text = text.split("<non-verbose/>")[0].split("<backtrace>")[0]
    return f"{' '.join(text.split()):.300}"
