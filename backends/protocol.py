"""The seam between the engine and the models: chunks of token ids in, logits out."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from tightrope.backends.planning import UNKNOWN, MemoryShares
from tightrope.backends.reuse import Accepts, Reuse, Wanted, always

if TYPE_CHECKING:  # Torch takes seconds to import, and who only schedules or writes needs none of it.
    from torch import Tensor

    from tightrope.backends.holdings import Holdings
    from tightrope.kernels.forms.layout import CacheDtype

WantLogits = Literal["none", "last", "all"]
MAX_ADDED_TEXTS = 16_384  # Vocabularies with most of them hold some 6,000, such as HTML's tags and unused places.


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of one step; prefill, chunked prefill and decode are the same thing.

    `token_ids` [n] run now, at positions start .. start + n. All tokens of the sequence before `start` are in the cache
    already, or in a chunk before this one.
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    want_logits: WantLogits
    adapter: str | None = None  # It names one that is loaded.
    adapter_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Cache cells, in tokens: `used` by live sequences, `reusable` by finished ones, which go when room is needed.

    A sequence takes them `grain` at a time: its last ones may hold one token and no more.
    """

    capacity: int
    used: int
    reusable: int
    grain: int = 1


class KVCache(Protocol):
    """Bookkeeping and storage of keys and values; both belong to the backend."""

    def open(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        namespace: str,
        *,
        reuse: Wanted = "exact",
        accepts: Accepts = always,
        reproducible: bool = False,
        steady: bool = False,
    ) -> Reuse:
        """Begin a sequence and return what was found cached of `token_ids`, which is pinned until `close`.

        The last of them is never found, so that at least one token is left to run. Exact reuse finds beginnings: one
        run at 0, or none. With "moved" a cache may add runs behind it that were computed at other places; whatever is
        computed over these isn't exact either, and "exact" never finds it. Sequences of different namespaces never
        share.
        accepts: asked of a find that isn't all exact, before anything has changed, in how many of the prompt's first
        tokens it may be used; where these hold too little of it, "exact" counts.
        `reproducible`: if no other sequence is live, the new one is laid out as in an empty cache, so that the same
        tokens over the same cached ones give the same logits to the last bit, whatever ran before.
        `steady`: then they give what they would over none, too, if they run in steps of `Capabilities.steady_tokens` at
        least: of a prefix only what ran in such steps alone is found, and enough is left for another one.
        """

    def fetch(self, seq_id: int, token_ids: Sequence[int], namespace: str, *, reuse: Wanted = "exact") -> bool:
        """Bring closer some of what is kept of a prompt outside the cache, in no more time than a short step takes.

        False: there is more, so ask again after the next step. `open` finds the same without this, and takes as long as
        it takes.
        """

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        """Make sure that `num_tokens` more tokens than are committed have room; evicts finished sequences if it must.

        False: no room, and nothing changed; the caller waits or preempts.
        """

    def commit(self, seq_id: int, start: int, token_ids: Sequence[int]) -> None:
        """Record that a forward pass has stored `token_ids` from place `start` on; later sequences can match them.

        `start` is a place that was not found, and everything before it is there.
        """

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens.

        Raises BackendError where layers with a window or a state have moved on from there.
        """

    def close(self, seq_id: int, *, keep: bool) -> None:
        """End a sequence. keep: its tokens stay matchable until evicted."""

    def leave(self, token_ids: Sequence[int], namespace: str) -> None:
        """Say that nobody will compute anew what is stored of these tokens and isn't exact: it is kept as it is."""

    def report_to(self, holdings: "Holdings") -> None:
        """Tell from now on which tokens can be found, in the cache and outside it."""

    def usage(self) -> KVUsage: ...

    def check_integrity(self) -> None:
        """Raise AssertionError, with one line that says what is wrong, if the books contradict themselves.

        For tests, between steps: it looks at every token and page.
        """


class Tokenizer(Protocol):
    """Text to token ids and back, exactly as the model's files say. Safe to call from any thread."""

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]  # Each of these tokens ends a turn.
    adds_bos: bool  # Prompts of this model start with bos_id then.
    lost_bytes: bytes  # These bytes of UTF-8 may become no token at all.
    # other bytes of text that one token stands for, at most; None: any text may be left out, or be one token
    max_token_bytes: int | None

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        """Token ids of `text`, without BOS.

        parse_special: the text of a special token becomes that token; otherwise it is plain text. is_start: the text
        opens the prompt (a sentencepiece vocabulary puts its leading space there and nowhere else).
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to the text; a special token gives its own text, such as b"</s>"."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, whose text doesn't belong in an answer."""

    def special_texts(self) -> Sequence[str]:
        """The texts of all tokens that `parse_special` would recognise."""

    def added_texts(self) -> Sequence[str]:
        """The texts of added and user-defined tokens that no flag makes special, in the order of their ids.

        Which of them are marks of a chat is for the chat template to say. Blanks and byte pieces are none, and what
        comes after the first MAX_ADDED_TEXTS is left out.
        """

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        """Make added texts special from now on, and those of `ends` ends of a turn; others are ignored.

        To be called before the first request, while nothing else uses the tokenizer. `ends` may name special texts too.
        """


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a loaded model says about itself."""

    model_id: str  # Clients see this name.
    architecture: str  # It is "llama" or "gemma3", say.
    format: str  # It is "gguf Q4_1, 4.9 bpw", say.
    max_model_len: int  # It is the window served, in tokens.
    trained_len: int  # It is the window of the model's own files, in tokens.
    cache_dtype: str
    chat_template: str | None  # It is Jinja source from the model's files.
    notes: tuple[str, ...]  # They are start-up lines: what was chosen, and why.
    cache_token_bytes: float = 0.0  # Keys and values of one token take so many in all layers; 0 is not known.
    # bos_token, pad_token, additional_special_tokens and the like: texts that chat templates use by these names
    named_tokens: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    chat_templates: tuple[tuple[str, str], ...] = ()  # Names stand beside Jinja sources, where the files hold several.
    memory: MemoryShares = UNKNOWN
    fault: str | None = None  # It is one line on what makes the model slow here, and what mends that.


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the engine may ask of this backend."""

    max_num_seqs: int  # So many sequences may be open at the same time.
    max_step_tokens: int  # One forward call takes so many over all chunks.
    max_prompt_rows: int  # Chunks that want the logits of all their rows may have so many in one forward call.
    mixes_adapters: bool = True  # Chunks of one forward call may differ in adapter and scale then.
    # Alone, a prompt gives the same logits however it is cut into steps of so many tokens; 0: nothing is gained so.
    steady_tokens: int = 0


class AdapterStore(Protocol):
    """The adapters beside a model's weights, by the names that chunks use; those of the settings are in place."""

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        """Read and check an adapter; the result, called between steps, puts it in place.

        This may run in another thread, beside `forward`, one at a time. Both raise BackendError, and have then changed
        nothing.
        """

    def tokenizer(self, name: str) -> Tokenizer | None:
        """The adapter's own, of a vocabulary that isn't the model's; None for an adapter without, or not in place.

        With it ids go up to its `vocab_size`, and logits of a step are as wide as the largest vocabulary in it.
        """

    def fingerprint(self, name: str) -> str:
        """What tells an adapter in place from those with other numbers, in every process: see adapters.fingerprint."""

    def remove(self, name: str) -> None:
        """Forget an adapter that no chunk will name any more, in place or prepared; between steps."""


class Backend(Protocol):
    """A loaded model."""

    card: ModelCard
    capabilities: Capabilities
    kv: KVCache
    tokenizer: Tokenizer
    adapters: AdapterStore

    def forward(self, chunks: Sequence[Chunk]) -> "Tensor":
        """Run the chunks, whose room is reserved, and return float32 [rows wanted, V] in chunk order.

        The result may be overwritten by the next call. Raises BackendError when the model can't run; the caller then
        treats every chunk as not stored.
        """

    def close(self) -> None: ...


class CacheVariants(Protocol):
    """The weights of a backend with other caches."""

    @property
    def num_layers(self) -> int: ...

    def variant(self, dtypes: "Sequence[CacheDtype]") -> Backend:
        """A backend whose layers are cached so, [num_layers].

        It shares the books of the first: it can only run what that one has just run and not yet committed.
        """


@runtime_checkable
class SharesWeights(Protocol):
    """A backend whose caches can be compared without loading the model again."""

    def variants(self) -> CacheVariants: ...
