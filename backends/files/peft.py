"""PEFT adapters as files: a folder with adapter_config.json and adapter_model.safetensors, checked by their headers.

Source: the files that huggingface/peft writes. y += scaling * up(down(x)), where the config gives the scaling.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft_config import CONFIG, PeftConfig, read_peft_config
from tightrope.backends.files.safetensors import Checkpoint, TensorEntry
from tightrope.backends.files.tensor_names import COMPUTED, OTHER_USE, nest_of

if TYPE_CHECKING:
    from tightrope.backends.settings import ModelSettings  # It needs pydantic, and the benchmarks of a card do not.

WEIGHTS = "adapter_model.safetensors"
FLOATS = ("F32", "F16", "BF16")  # Its numbers have these types.
USED = "lora_A and lora_B of linears, lora_embedding_A and _B, and whole embeddings, heads and norms"

# a name as peft writes it is PREFIX, the module's path, and what it is; old files also say whose, mostly "default"
_PREFIX = "base_model.model."
_WHOSE = r"(\.[^.]+)?"
_HALF = re.compile(rf"(?P<module>.+)\.lora_(?P<part>A|B){_WHOSE}\.weight")
_TABLE_HALF = re.compile(rf"(?P<module>.+)\.lora_embedding_(?P<part>A|B){_WHOSE}")
_TOKENS = re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_WHOSE}")
_BASE = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.(original_module|base_layer)\.(?P<part>weight|bias)")
_OWN = re.compile(rf"(?P<module>.+)\.modules_to_save{_WHOSE}\.(?P<part>weight|bias)")
_PLAIN = re.compile(r"(?P<module>.+)\.(?P<part>weight|bias)")
_TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "embeddings")  # Their modules' names end so.


Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to one linear: tensors A [rank, inputs] and B [outputs, rank], by their names, and the scaling.

    To an embedding [V, hidden] the same, seen from its outputs: A [rank, V] and B [hidden, rank].
    """

    down: TensorEntry
    up: TensorEntry
    scaling: float


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Single rows of an embedding or a head: ids, and a tensor [len(ids), hidden]."""

    token_ids: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter whose headers are checked. Keys are paths of modules in the base model, in `own` of their tensors.

    own: whole tensors in the place of the base's. base: whole tensors of the base that the adapter was trained beside,
    as peft saves them with embeddings; where embedding and head are tied, such a tensor is that of both.
    """

    folder: Path
    checkpoint: Checkpoint
    config: PeftConfig
    deltas: Mapping[str, Delta]
    table_deltas: Mapping[str, Delta]
    tokens: Mapping[str, TokenRows]
    own: Mapping[tuple[str, str], TensorEntry]  # They stand by module and "weight" or "bias".
    base: Mapping[str, TensorEntry]
    notes: tuple[str, ...]


def read_adapter(folder: Path) -> PeftAdapter:
    """Raises BackendError, naming file and field, for what is no LoRA, or one that computes something else."""
    config = read_peft_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.exists():
            raise BackendError(
                f"{pickle}: pickled weights can run code when they are read, so they are not; "
                "convert the adapter to safetensors"
            )
        raise BackendError(f"{folder}: {WEIGHTS} is missing")
    reading = _Reading(config, path)
    for name, entry in reading.checkpoint.tensors.items():
        reading.take(name, entry)
    return reading.adapter(folder)


class _Reading:
    """One walk over an adapter's tensors."""

    def __init__(self, config: PeftConfig, path: Path) -> None:
        self.config, self.path, self.checkpoint = config, path, Checkpoint.of_file(path)
        self._halves: dict[str, dict[str, TensorEntry]] = {}
        self._table_halves: dict[str, dict[str, TensorEntry]] = {}
        self._tokens: dict[str, TokenRows] = {}
        self._own: dict[tuple[str, str], TensorEntry] = {}
        self._marked: dict[tuple[str, str], TensorEntry] = {}  # Their names say that they are the adapter's own.
        self._base: dict[str, TensorEntry] = {}
        self._left: list[str] = []
        self._nest = nest_of(name.removeprefix(_PREFIX) for name in self.checkpoint.tensors)

    def take(self, name: str, entry: TensorEntry) -> None:
        """Put one tensor where it belongs. Raises BackendError for one that can't be used."""
        inner = name.removeprefix(_PREFIX)
        is_of_text = not self._nest or inner.startswith((self._nest, "lm_head."))
        if not is_of_text or COMPUTED.search(inner) or OTHER_USE.search(inner):
            self._left.append(name)
        elif match := _HALF.fullmatch(inner):
            self._put(self._halves.setdefault(match["module"], {}), match["part"], entry)
        elif match := _TABLE_HALF.fullmatch(inner):
            self._put(self._table_halves.setdefault(match["module"], {}), match["part"], entry)
        elif match := _TOKENS.fullmatch(inner):
            self._put(self._tokens, match["module"], self._token_rows(match["module"], entry))
        elif match := _BASE.fullmatch(inner):
            is_table = match["module"].endswith(_TABLES) and match["part"] == "weight"
            if is_table:
                self._put(self._base, match["module"], entry)
            else:
                self._left.append(name)
        elif match := _OWN.fullmatch(inner):
            self._put(self._marked, (match["module"], match["part"]), entry)
        elif ".lora_" not in inner and (match := _PLAIN.fullmatch(inner)):
            module, part = match["module"], match["part"]
            is_own = self.config.saves(module) or part == "bias" or not module.endswith(_TABLES)
            if is_own:
                self._put(self._own, (module, part), entry)
            else:
                self._put(self._base, module, entry)
        else:
            raise BackendError(f"{self.path}: tensor {name!r} can't be used; {USED} can")

    def adapter(self, folder: Path) -> PeftAdapter:
        deltas = {module: self._delta("lora_", module, parts) for module, parts in self._halves.items()}
        table_deltas = {
            module: self._delta("lora_embedding_", module, parts) for module, parts in self._table_halves.items()
        }
        own = self._marked | self._own
        if not (deltas or table_deltas or own or self._tokens or self._base):
            raise BackendError(f"{self.path}: holds no adapter")
        left = self._left
        notes = (f"{self.path}: {len(left)} tensors are left out, {left[0]!r} among them",) if left else ()
        return PeftAdapter(
            folder, self.checkpoint, self.config, deltas, table_deltas, self._tokens, own, self._base,
            notes,
        )  # fmt: skip

    def _put(self, where: dict[Key, Value], key: Key, value: Value) -> None:
        if key in where:
            raise BackendError(f"{self.path}: holds {key!r} twice; a file of one adapter can be used")
        where[key] = value

    def _token_rows(self, module: str, entry: TensorEntry) -> TokenRows:
        token_ids = self.config.tokens_of(module)
        if token_ids is None:
            raise BackendError(f"{self.path}: tensor {entry.name!r}: trainable_token_indices of {CONFIG} has no ids")
        if len(entry.shape) != 2 or entry.shape[0] != len(token_ids):
            raise BackendError(
                f"{self.path}: tensor {entry.name!r} has shape {list(entry.shape)}; trainable_token_indices of "
                f"{CONFIG} names {len(token_ids)} tokens"
            )
        return TokenRows(token_ids, entry)

    def _delta(self, kind: str, module: str, parts: Mapping[str, TensorEntry]) -> Delta:
        if parts.keys() != {"A", "B"}:
            there, missing = ("A", "B") if "A" in parts else ("B", "A")
            raise BackendError(f"{self.path}: {module!r} has {kind}{there} but no {kind}{missing}")
        down, up = parts["A"], parts["B"]
        rank = self.config.rank_of(module)
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise BackendError(
                f"{self.path}: {kind}A {list(down.shape)} and {kind}B {list(up.shape)} of {module!r} don't fit rank "
                f"{rank:g}, which {CONFIG} gives"
            )
        return Delta(down, up, self.config.scaling_of(module))


def check_float(entry: TensorEntry) -> None:
    """Raises BackendError for numbers of a type that adapters don't have."""
    if entry.dtype not in FLOATS:
        raise BackendError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}; {', '.join(FLOATS)} can be used")


def adapter_bytes(adapter: PeftAdapter) -> int:
    """What an adapter takes in memory at most: two bytes a number of low rank, whole weights as in the file."""
    deltas = (*adapter.deltas.values(), *adapter.table_deltas.values())
    low_rank = sum(prod(entry.shape) for delta in deltas for entry in (delta.down, delta.up))
    whole = (*adapter.own.values(), *adapter.base.values(), *(rows.entry for rows in adapter.tokens.values()))
    return 2 * low_rank + sum(entry.num_bytes for entry in whole)


def room_for_adapters(settings: "ModelSettings", read: Callable[[Path], PeftAdapter] = read_adapter) -> int:
    """Bytes of the adapters that are loaded at the start, and of the room for more. Raises BackendError."""
    at_start = sum(adapter_bytes(read(Path(path).expanduser())) for path in settings.adapters.values())
    return at_start + settings.adapter_reserve_bytes
