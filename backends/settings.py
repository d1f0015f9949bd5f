"""What a person may choose about a model: where it is, how it is cached, how its positions are scaled."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, field_validator

from tightrope.backends.reuse import CacheReuse
from tightrope.backends.threads import most_threads, usable_cpus

KVCacheDtype = Literal["auto", "q8", "q4", "f16"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
SumsDtype = Literal["float32", "float16"]
Quantize = Literal["awq", "exl2", "gptq", "bitsandbytes-nf4"]  # TGI's launcher calls them so.
GgufEngine = Literal["auto", "own", "llama.cpp"]
SplitMode = Literal["none", "layer", "row"]  # llama.cpp calls them so.
RopeKind = Literal["none", "linear", "dynamic", "ntk", "yarn", "llama3", "longrope"]

MAX_ADAPTER_NAME = 128  # It is in characters.
MAX_TOKENS = 1 << 30  # The places of a window or a cache are counted with 32 bits.
MAX_TRAINED_LEN = 1 << 28  # A model's own files are believed as much.
MAX_SEQS = 128  # All of them are rows of each decoding step, and their logits are kept side by side.
MAX_STEP_TOKENS = 1 << 16  # The workspace grows by each, and no kernel gains by more than some thousands.
MIN_STEP_TOKENS = 16
STEP_TOKENS, STEP_TOKENS_ON_CARD = 512, 2048  # Where nobody says: a card has to expand its weights for each step.
MAX_RANKS = 8  # Of a machine's cards; each waits for the slowest of all others, hundreds of times a step.
MAX_GPU_LAYERS = 1 << 16  # No model has so many; people write 999 or 9999 for all of them.
MAX_CARDS = 16  # A machine has no more.
MAX_CARD_GIB = 1024.0  # A card with a TiB is yet to be built.
MAX_PROPORTION = 1e6  # People write layers or GiB.
MAX_ADAPTER_MIB = 1 << 20  # Large machines have about a TiB in all.
MAX_HOST_MIB = 1 << 22  # So has what is beside the cache; 4 TiB are more than any has.
MAX_DISK_MIB = 1 << 28  # No file system that is in use is larger than 256 TiB.
WRITE_MIB = 64  # Runs that wait to be written to a folder take this at least.
MAX_EMBEDDING_MODELS = 4  # Each is in memory all the time.
MIN_EMBEDDED_TOKENS, MAX_EMBEDDED_TOKENS = 16, 1 << 15  # Memory for attention grows with the square of a text.
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,2})?")  # No machine has a hundred cards.
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][\w.:-]*(/[A-Za-z0-9][\w.:-]*)*", re.ASCII)


def split_pairs(text: str) -> list[tuple[str, str | None]]:
    """NAME=VALUE, with commas between several; None is the value where there is no =."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return [(name.strip(), value.strip() if equals else None) for name, equals, value in pairs]


def written(numbers: str | Sequence[float]) -> str:
    """Numbers with commas between, as people write them; a word as it is."""
    return numbers if isinstance(numbers, str) else ",".join(f"{number:g}" for number in numbers)


def check_adapter_name(name: str) -> None:
    """Raises ValueError for what can't name an adapter: a name is shown in lists, logs and URLs."""
    if len(name) > MAX_ADAPTER_NAME or not _ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:60]!r} can't name an adapter: up to {MAX_ADAPTER_NAME} letters, digits and . _ : - can, in parts "
            "with / between that begin with a letter or digit"
        )


class CacheSettings(BaseModel, frozen=True, extra="forbid"):
    """Where keys and values live."""

    tokens: int = Field(
        0, ge=0, le=MAX_TOKENS, description="Capacity in tokens over all sequences; 0 chooses what is right."
    )
    dtype: KVCacheDtype = Field("auto", description="Storage of keys and values; auto chooses for machine and memory.")
    host_mib: int | None = Field(
        None,
        ge=0,
        le=MAX_HOST_MIB,
        description="The host's memory for what has left the cache, in MiB; None is what is left, at most a cache's.",
    )
    session_dir: str | None = Field(None, min_length=1, description="Folder that chats are kept in; None keeps none.")
    session_disk_mib: int = Field(8192, ge=1, le=MAX_DISK_MIB, description="Most that this folder takes, in MiB.")

    @property
    def host_reserve_bytes(self) -> int:
        """The host's memory that runs beside the cache have in any case: as asked, and where they wait for the disk."""
        least = 0 if self.session_dir is None else WRITE_MIB
        return max(self.host_mib or 0, least) << 20

    def host_run_bytes(self, cache_bytes: int, spare_bytes: int) -> int:
        """The host's memory for runs beside a cache, where `spare_bytes` are left beside all else.

        Where nobody says: as much as the cache has, and at most half of what is left.
        """
        if self.host_mib is not None:
            return self.host_reserve_bytes
        return max(self.host_reserve_bytes, min(cache_bytes, max(0, spare_bytes) // 2))

    reuse: CacheReuse = Field(
        "moved", description="Cached tokens that prompts may take; exact: where nothing before them has changed alone."
    )


class RopeSettings(BaseModel, frozen=True, extra="forbid"):
    """RoPE scaling that overrides what the model's own files say; None leaves a value as the files have it."""

    kind: RopeKind | None = None
    factor: float | None = Field(None, ge=1e-6, le=1e6, description="How many times the trained window.")
    theta: float | None = Field(None, gt=1, le=1e18, description="RoPE base frequency.")
    original_len: int | None = Field(
        None, ge=2, le=MAX_TRAINED_LEN, description="Window before any scaling, in tokens."
    )


class EmbeddingSettings(BaseModel, frozen=True, extra="forbid"):
    """Models that make vectors of texts or rank them, in a process of their own beside the chat model's."""

    models: tuple[str, ...] = Field(
        (), max_length=MAX_EMBEDDING_MODELS, description="Their paths or hub ids; what each does its files say."
    )
    max_tokens: int = Field(
        2048, ge=MIN_EMBEDDED_TOKENS, le=MAX_EMBEDDED_TOKENS, description="Most tokens of a text; the model's if less."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment and the command line give the list as one text, with commas."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class ModelSettings(BaseModel, frozen=True, extra="forbid"):
    """Which model to load and how."""

    model: str | None = Field(
        None, description="Path to a .gguf file, model folder, or hub id; None is the bundled one."
    )
    revision: str | None = Field(None, description="Hub revision; None is the default branch.")
    hub_cache: str | None = Field(None, description="Where downloads go; None leaves it to the hub library.")
    quantize: Quantize | None = Field(None, description="Format that the weights must be in; None takes any.")
    gguf_engine: GgufEngine = Field(
        "auto", description="What runs a GGUF file: own is the torch engine, on a CPU; auto is that where it can."
    )
    max_model_len: int = Field(
        0, ge=0, le=MAX_TOKENS, description="Context window in tokens; 0 is the model's own, or what fits."
    )
    max_num_seqs: int = Field(16, ge=1, le=MAX_SEQS, description="Sequences that run at the same time.")
    step_tokens: int = Field(
        0,
        ge=0,
        le=MAX_STEP_TOKENS,
        description="Most tokens in one step (the token budget); 0 is right for the device.",
    )
    threads: int = Field(
        0,
        ge=0,
        description="Most CPU threads, four per usable CPU or less; 0: one per physical core.",
    )
    device: str = Field("auto", description="Where the model runs: auto, cpu, cuda, or cuda:N for one card of several.")
    tensor_parallel: int = Field(
        0,
        ge=-1,
        le=MAX_RANKS,
        description="Ranks that a model is split over, one a card; -1: all cards; 0: all where it does not fit one.",
    )
    gpu_layers: int = Field(0, ge=-1, le=MAX_GPU_LAYERS, description="Layers on the GPU; -1 is all of them.")
    n_cpu_moe: int = Field(
        0, ge=0, le=MAX_GPU_LAYERS, description="Layers, from the first on, whose experts stay in the host's memory."
    )
    split_mode: SplitMode = Field("layer", description="How llama.cpp shares a GGUF file out among several cards.")
    gpu_split: (
        Literal["auto"] | tuple[Annotated[float, Field(ge=0, le=MAX_CARD_GIB, allow_inf_nan=False)], ...] | None
    ) = Field(
        None, description="How much of each card the layers of a folder's model take, in GiB; auto: what is free."
    )
    tensor_split: tuple[Annotated[float, Field(ge=0, le=MAX_PROPORTION, allow_inf_nan=False)], ...] = Field(
        (), max_length=MAX_CARDS, description="In which proportions it does; none: by what each has free."
    )
    dtype: Dtype = Field("auto", description="Of hidden states on a GPU; auto is the files' if it has 16 bits.")
    matmul_sums: SumsDtype = Field("float32", description="Of products of float16 numbers on a GPU.")
    batch_invariant: bool = Field(
        False, description="Whether plain weights on a CPU give the same bits in every batch, too."
    )
    keep_free_mib: int = Field(
        0, ge=0, le=MAX_HOST_MIB, description="The machine's memory that is free now, and will be others', in MiB."
    )
    max_memory_mib: int | None = Field(
        None,
        ge=1,
        le=MAX_HOST_MIB,
        description="Most of the machine's memory that is taken, in MiB; None: any.",
    )
    gpu_memory_fraction: float = Field(1.0, gt=0, le=1, description="Most of a card's whole memory that is taken.")
    cache: CacheSettings = CacheSettings()
    rope: RopeSettings = RopeSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    adapters: dict[str, str] = Field({}, description="LoRA adapters: paths by the names that requests use.")
    adapter_folder: str | None = Field(None, description="Where adapters may be loaded from while the model runs.")
    adapter_memory_mib: int = Field(512, ge=1, le=MAX_ADAPTER_MIB, description="Memory kept for these, in MiB.")

    @property
    def adapter_reserve_bytes(self) -> int:
        """Memory for adapters beside those that are loaded at the start."""
        return 0 if self.adapter_folder is None else self.adapter_memory_mib << 20

    @property
    def types_on_a_card(self) -> tuple[str, ...]:
        """The options given that say in what types of 16 bits a card computes, as they are written."""
        given = (("dtype", self.dtype, ("auto", "float32")), ("matmul-sums", self.matmul_sums, ("float32",)))
        return tuple(f"--{option} {value}" for option, value, others in given if value not in others)

    def step_tokens_on(self, device_type: str) -> int:
        """Most tokens in one step on a "cpu" or "cuda" device: as asked, else what is right if memory has room."""
        return self.step_tokens or (STEP_TOKENS_ON_CARD if device_type == "cuda" else STEP_TOKENS)

    @field_validator("tensor_parallel", mode="before")
    @classmethod
    def _count_cards(cls, value: object) -> object:
        """TGI's launcher says whether a model is split, beside into how many parts."""
        words = {"all": -1, "true": -1, "false": 1}
        return words.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator("tensor_split", "gpu_split", mode="before")
    @classmethod
    def _split_numbers(cls, value: object) -> object:
        """The environment and the command line give numbers as one text, with commas; a file may give one alone."""
        if isinstance(value, str) and value != "auto":
            return tuple(part.strip() for part in value.split(","))
        return (value,) if isinstance(value, int | float) else value

    @field_validator("tensor_split")
    @classmethod
    def _check_proportions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and not any(value):
            raise ValueError("a card must get something: at least one number above 0")
        return value

    @field_validator("gpu_split", mode="wrap")
    @classmethod
    def _check_split(cls, value: object, read: ValidatorFunctionWrapHandler) -> object:
        try:
            found = read(value)
        except ValueError:
            found = ()
        if found is not None and found != "auto" and not (0 < len(found) <= MAX_CARDS and any(found)):
            raise ValueError(
                f"should be auto, or GiB for each card with commas between, such as 20,24, each up to {MAX_CARD_GIB:g}"
            )
        return found

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"should be auto, cpu, cuda, or cuda:N for one card of several, not {value!r:.80}")
        return value

    @field_validator("threads")
    @classmethod
    def _check_threads(cls, value: int) -> int:
        if value > most_threads():
            cpus = len(usable_cpus())
            raise ValueError(f"at most {most_threads()} threads for the {cpus} CPUs that may be used, not {value}")
        return value

    @field_validator("step_tokens")
    @classmethod
    def _check_step_tokens(cls, value: int) -> int:
        if 0 < value < MIN_STEP_TOKENS:
            raise ValueError(f"at least {MIN_STEP_TOKENS}, or 0 for what is right, not {value}")
        return value

    @field_validator("adapters", mode="before")
    @classmethod
    def _split_adapters(cls, value: object) -> object:
        """The environment and the command line give NAME=PATH, with commas between several."""
        if not isinstance(value, str):
            return value
        pairs = split_pairs(value)
        for name, path in pairs:
            if not name or not path:
                raise ValueError(f"expected NAME=PATH, not {name or path!r}")
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands for two adapters")
        return dict(pairs)

    @field_validator("adapter_folder")
    @classmethod
    def _check_folder(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).expanduser().is_dir():
            raise ValueError(f"there is no folder {value!r}")
        return value

    @field_validator("adapters")
    @classmethod
    def _check_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            check_adapter_name(name)
        return value
