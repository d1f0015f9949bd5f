"""What crosses the process border, and what the server and the engine call things.

Everything here is a msgspec struct, encoded as msgpack; nothing here imports torch.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

LONGEST_RUN = 256  # tokens of a repetition that DRY and no_repeat_ngram_size tell apart

# The order in which truncation runs unless a request names another; the sampler's package says what each step does.
SAMPLER_ORDER = (
    "temperature",
    "smoothing",
    "top_n_sigma",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "tfs",
    "top_a",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc",
)


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. Defaults are neutral; the server has checked the ranges.

    Penalties, biases and bans edit the logits first; then the steps of `order` run; mirostat or adaptive-p comes last.
    With a temperature of 0 the likeliest token is taken, and no step runs.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    typical_p: float = 1.0  # (0, 1]
    repetition_penalty: float = 1.0  # > 0; over prompt and output, once per id
    frequency_penalty: float = 0.0  # times the count of the id in the output
    presence_penalty: float = 0.0  # if the id is in the output
    relative_frequency_penalty: float = 0.0  # times the share of the id in prompt and output (TGI's frequency_penalty)
    penalty_range: int = 0  # the last n tokens that penalties look at; 0 is all
    repetition_decay: int = 0  # tokens before that range over which penalties fade; 0 where the range is all
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None  # [0, 2**64); None draws one, which is reported back
    dynatemp_range: float = 0.0  # >= 0; the temperature moves by so much up and down with the entropy
    dynatemp_exponent: float = 1.0  # > 0; of the entropy's share of its largest possible value
    smoothing_factor: float = 0.0  # [0, 1000]; 0 is off
    smoothing_curve: float = 1.0  # [1, 100]
    top_n_sigma: float = 0.0  # >= 0; 0 is off
    tfs: float = 1.0  # (0, 1]
    top_a: float = 0.0  # [0, 1]
    epsilon_cutoff: float = 0.0  # [0, 1); a probability
    eta_cutoff: float = 0.0  # [0, 1); a probability
    xtc_probability: float = 0.0  # [0, 1]; how often XTC acts
    xtc_threshold: float = 0.1  # [0, 1]; above 0.5 nothing happens
    mirostat_mode: int = 0  # 0 is off; 1 or 2
    mirostat_tau: float = 5.0  # > 0; the surprise aimed at, in bits
    mirostat_eta: float = 0.1  # (0, 1]; how fast the aim is corrected
    adaptive_target: float = -1.0  # [0, 1], the probability aimed at; negative is off; not together with mirostat
    adaptive_decay: float = 0.9  # [0, 1); the share of what was drawn before in the mean that is corrected
    skew: float = 0.0  # [-20, 20]; the draw leans to less likely tokens above 0, to likelier ones below
    dry_multiplier: float = 0.0  # >= 0; 0 is off
    dry_base: float = 1.75  # >= 1
    dry_allowed_length: int = 2  # [1, 256] tokens that may be repeated without a penalty
    dry_range: int = 0  # the last n tokens that are looked at; 0 is all
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # texts that no repetition reaches across
    no_repeat_ngram_size: int = 0  # [0, 256]; 0 is off
    min_keep: int = 0  # truncation leaves so many tokens at least
    banned_tokens: tuple[int, ...] = ()
    banned_strings: tuple[str, ...] = ()  # texts that the output never holds, in whatever case
    order: tuple[str, ...] = ()  # of steps in SAMPLER_ORDER; those not named follow as they stand there


class StopRules(Struct, frozen=True, omit_defaults=True):
    """When a sequence ends."""

    max_tokens: int | None = None  # None is to the end of the window
    min_tokens: int = 0  # end tokens and stop strings are held back until then
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()  # besides the model's own end tokens
    ignore_eos: bool = False  # end tokens are never drawn
    keep_stop_text: bool = False  # TGI keeps the stop text at the end, OpenAI cuts it
    length_first: bool = False  # an end token that comes as the last allowed one counts as length (TGI)


class LogprobRequest(Struct, frozen=True):
    """Log probabilities of the generated tokens."""

    processed: bool  # of the distribution that was drawn from (TGI), else of the raw logits (OpenAI)
    top: int = 0  # that many of the likeliest tokens besides


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
    grammar of the client's, in GBNF or Lark; a Lark grammar of the front's own making.
    """

    kind: GrammarKind
    text: str
    field: str


class Guidance(Struct, frozen=True):
    """A text that the answer is led away from, by how much the prompt makes a token likelier than the text does."""

    text: str  # "" is no text at all
    scale: float  # >= 0; 1 changes nothing


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
    prompt_logprobs: int | None = None  # raw logprobs of the prompt's tokens, with that many alternatives
    truncate_to: int | None = None  # keep the last n tokens of the prompt
    reserve_tokens: int | None = None  # new tokens that must fit the window; None is stop.max_tokens, or 1
    skip_special_tokens: bool = True
    namespace: str = ""  # requests of different namespaces never share cached tokens
    adapter: str | None = None  # the name of one that is loaded; its cached tokens are shared with nobody else's
    adapter_scale: float = 1.0


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
    tokens: tuple[Token, ...] | None = None  # with prompt_logprobs


FinishReason = Literal["eos", "stop_token", "stop_string", "length", "error"]


class Finish(Struct, frozen=True):
    """How a choice ended. `matched` is the stop string or token id; `message` says what was wrong with an error."""

    reason: FinishReason
    num_tokens: int
    timings: Timings
    matched: str | int | None = None
    message: str | None = None


class Delta(Struct, frozen=True):
    """What one step added to one choice.

    `text` is ready to be shown: no torn character, nothing that may still become a stop string. It can lag behind
    `tokens`; all deltas' texts joined are the whole answer.
    """

    request_id: str
    index: int
    text: str
    tokens: tuple[Token, ...]
    prompt: PromptInfo | None = None
    finish: Finish | None = None


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
    chat_templates: tuple[tuple[str, str], ...] = ()  # names and Jinja sources, where the files hold several
    added_texts: tuple[str, ...] = ()  # of added and user-defined tokens that are not special
    end_texts: tuple[str, ...] = ()  # of the tokens that end a turn
    adapter_texts: tuple[str, ...] = ()  # of special tokens that only the adapters have that requests may use


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
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    preemptions: int = 0
    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
