"""What crosses the process border, and what the server and the engine call things.

Everything here is a msgspec struct, encoded as msgpack; nothing here imports torch.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from tightrope.backends.planning import UNKNOWN, MemoryShares
from tightrope.backends.reuse import CacheReuse
from tightrope.engine.sampler.steps import SamplingParams


class StopRules(Struct, frozen=True, omit_defaults=True):
    """When a sequence ends."""

    max_tokens: int | None = None  # None is to the end of the window.
    min_tokens: int = 0  # End tokens and stop strings are held back until then.
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()  # They end it beside the model's own end tokens.
    ignore_eos: bool = False  # End tokens are never drawn.
    keep_stop_text: bool = False  # TGI keeps the stop text at the end, OpenAI cuts it.
    length_first: bool = False  # An end token that comes as the last allowed one counts as length (TGI).


class LogprobRequest(Struct, frozen=True):
    """Log probabilities of the generated tokens."""

    processed: bool  # The distribution is the one that was drawn from (TGI), else that of the raw logits (OpenAI).
    top: int = 0  # So many of the likeliest tokens are listed besides.


class Span(Struct, frozen=True, array_like=True):
    """A piece of prompt text. parse_special: the text of special tokens in it becomes those tokens."""

    text: str
    parse_special: bool = True


class TextPrompt(Struct, frozen=True, tag="text"):
    """Text, one span after another; BOS is put in front if the model wants one and none is there, if add_bos."""

    spans: tuple[Span, ...]
    add_bos: bool = True


class TokenPrompt(Struct, frozen=True, tag="tokens"):
    """Token ids, run as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | TokenPrompt


GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "lark"]


class Grammar(Struct, frozen=True):
    """What the answer may look like; `field` is the request's name for it.

    `text` by kind: a JSON schema as JSON; a regular expression that the whole answer matches; a JSON list of texts; a
    grammar of the client's, in GBNF or Lark; a Lark grammar of the front's own making. A `frame` is a Lark grammar
    around it, in which `@answer` stands for it; the empty one is none.
    """

    kind: GrammarKind
    text: str
    field: str
    is_compact: bool = False  # JSON under a schema has no white space between its parts.
    frame: str = ""


class Guidance(Struct, frozen=True):
    """A text that the answer is led away from, by how much the prompt makes a token likelier than the text does."""

    text: str  # "" is no text at all.
    scale: float  # It is not negative, and 1 changes nothing.


class GenerateRequest(Struct, frozen=True):
    """One prompt and `n` independent answers to it."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    stop: StopRules = StopRules()
    grammar: Grammar | None = None
    guidance: Guidance | None = None
    n: int = 1
    logprobs: LogprobRequest | None = None
    prompt_logprobs: int | None = None  # The prompt's tokens get raw logprobs, with so many alternatives.
    truncate_to: int | None = None  # Only the last n tokens of the prompt are kept.
    reserve_tokens: int | None = None  # So many new tokens must fit the window; None is 1, if any are asked for.
    skip_special_tokens: bool = True
    shown_tokens: tuple[str, ...] = ()  # Special tokens of these texts are shown even so.
    cache_reuse: CacheReuse = "moved"  # Its prompt may be answered over cached tokens of this kind.
    namespace: str = ""  # Requests of different namespaces never share cached tokens.
    session: str = ""  # Requests of one session had better go to one replica, where there are several.
    adapter: str | None = None  # It names one that is loaded; its cached tokens are shared with nobody else's.
    adapter_scale: float = 1.0
    wants_progress: bool = False  # A delta tells when the prompt has been read to its end, too.


def cache_namespace(namespace: str, adapter: str | None, fingerprint: str, adapter_scale: float) -> str:
    """Whose cached tokens may be shared: keys and values depend on the adapter, and how much of it is used.

    The same in every process, whatever was loaded before. fingerprint: see AdapterStore.
    """
    return namespace if adapter is None else f"{namespace}\0{adapter}\0{fingerprint}\0{adapter_scale!r}"


class TopToken(Struct, frozen=True, array_like=True):
    """One of the likeliest tokens at a place."""

    token_id: int
    raw: bytes
    logprob: float
    is_special: bool


class Token(Struct, frozen=True, array_like=True):
    """One token of an answer or of a prompt.

    `raw` are the token's own bytes; `text` is what it adds to the text: "" while a character is torn between tokens,
    and for special tokens that are left out. `logprob` is None where nobody asked, and for a prompt's first token.
    """

    token_id: int
    raw: bytes
    text: str
    logprob: float | None
    is_special: bool
    top: tuple[TopToken, ...] = ()


class TokenPiece(Struct, frozen=True, array_like=True):
    """What every token of an id is."""

    raw: bytes
    is_special: bool


class TokenRun(Struct, frozen=True):
    """The tokens of a text, of which there may be millions: ids, and each id's piece once."""

    packed: bytes  # [n] int32, in this machine's order of bytes
    pieces: dict[int, TokenPiece]

    @classmethod
    def of(cls, token_ids: Sequence[int], piece: Callable[[int], TokenPiece]) -> "TokenRun":
        """The run of these ids; `piece` is asked once for each."""
        return cls(array("i", token_ids).tobytes(), {i: piece(i) for i in set(token_ids)})

    @classmethod
    def bare(cls, token_ids: Sequence[int]) -> "TokenRun":
        """The ids alone."""
        return cls(array("i", token_ids).tobytes(), {})

    @property
    def ids(self) -> list[int]:
        return array("i", self.packed).tolist()

    def __len__(self) -> int:
        return len(self.packed) // array("i").itemsize

    def __iter__(self) -> Iterator[Token]:
        """The tokens one by one, each with its own text."""
        for token_id in self.ids:
            piece = self.pieces[token_id]
            yield Token(token_id, piece.raw, piece.raw.decode("utf-8", "replace"), None, piece.is_special)


class Timings(Struct, frozen=True, array_like=True):
    """Seconds that a sequence spent waiting, in prefill, and in decode."""

    queue_s: float
    prefill_s: float
    decode_s: float


class PromptInfo(Struct, frozen=True):
    """What became of the prompt; comes with the first delta of each choice."""

    num_tokens: int
    num_cached: int
    seed: int
    tokens: tuple[Token, ...] | None = None  # They are there with prompt_logprobs.
    num_moved: int = 0  # So many of the cached ones were moved there, or computed over such.


FinishReason = Literal["eos", "stop_token", "stop_string", "length", "error"]


class Finish(Struct, frozen=True):
    """How a choice ended. `matched` is the stop string or token id; `message` says what was wrong with an error."""

    reason: FinishReason
    num_tokens: int
    timings: Timings
    matched: str | int | None = None
    message: str | None = None


class PromptRead(Struct, frozen=True, array_like=True):
    """How far a prompt has been read, in tokens: `num_read` of `num_tokens`, among them `num_cached` that were found.

    `seconds` have passed since it began. The prompt of an answer that another engine had begun ends with what that
    one gave out, which is read again.
    """

    num_tokens: int
    num_cached: int
    num_read: int
    seconds: float


class Layout(Struct, frozen=True, array_like=True):
    """In which steps a sequence's tokens were computed, as far as the last bits of what comes next depend on it.

    Of each track first the tokens that were `found` cached, then in each of the `steps` so many; all behind them ran
    one a step. Not `is_exact`: nothing depends on it.
    """

    is_exact: bool
    found: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()


class Carry(Struct, frozen=True, array_like=True):
    """What another engine needs beside the tokens to go on behind a delta; None where nothing has changed.

    mu: of the sampler, where a step steers, see SamplerState.
    """

    mu: float | None
    layout: Layout | None


class Delta(Struct, frozen=True, omit_defaults=True):
    """What one step added to one choice.

    `text` is ready to be shown: no torn character, nothing that may still become a stop string. It can lag behind
    `tokens`; all deltas' texts joined are the whole answer. One with `read` has nothing else.
    """

    request_id: str
    index: int
    text: str
    tokens: tuple[Token, ...]
    prompt: PromptInfo | None = None
    finish: Finish | None = None
    carry: Carry | None = None
    read: PromptRead | None = None


class Written(Struct, frozen=True, array_like=True):
    """What has been given out of one choice, by an engine that is gone: the next one goes on behind it.

    token_ids: [n] int32, packed in this machine's order of bytes; seed and carry are the last that were told.
    """

    token_ids: bytes
    seed: int
    mu: float | None
    layout: Layout
    is_finished: bool


class ModelInfo(Struct, frozen=True):
    """What the front knows of the loaded model."""

    model_id: str
    architecture: str
    format: str
    vocab_size: int
    max_model_len: int
    trained_len: int
    cache_tokens: int
    cache_dtype: str
    max_num_seqs: int
    bos_token: str | None
    eos_token: str | None
    special_texts: tuple[str, ...]
    chat_template: str | None
    notes: tuple[str, ...]
    # bos_token, pad_token, additional_special_tokens and the like, as chat templates call them; pairs, to be hashable
    named_tokens: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    chat_templates: tuple[tuple[str, str], ...] = ()  # Names stand beside Jinja sources, where the files hold several.
    added_texts: tuple[str, ...] = ()  # They are of added and user-defined tokens that are not special.
    end_texts: tuple[str, ...] = ()  # Tokens of these texts end a turn.
    memory: MemoryShares = UNKNOWN
    adapter_texts: tuple[str, ...] = ()  # Only the adapters that requests may use have these special tokens.
    fault: str | None = None  # It is one line on what makes the model slow here, and what mends that.


def with_adapter_texts(info: ModelInfo, texts: Iterable[str]) -> ModelInfo:
    """The same with the special tokens of these adapters."""
    return replace(info, adapter_texts=tuple(t for t in texts if t not in info.special_texts))


class TurnMarks(Struct, frozen=True):
    """Texts of tokens that the chat template writes around turns: they are special, whatever flag the files give them.

    `ends` are those that end the model's turn.
    """

    texts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


class Stats(Struct, frozen=True):
    """Gauges and counters since the engine started; times in seconds, cache in tokens."""

    num_running: int = 0
    num_waiting: int = 0
    cache_used: int = 0
    cache_reusable: int = 0
    cache_capacity: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    moved_tokens: int = 0
    healed_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    preemptions: int = 0
    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
