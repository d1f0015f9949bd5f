"""A model made of rules: bytes are tokens, and the next token is a function of all tokens before it.

It keeps its cache as honestly as a real backend: logits depend on what was stored through `commit`, so an engine that
loses, mixes or repeats cached tokens writes other text.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.backends.adapters import fingerprint
from tightrope.backends.errors import BackendError
from tightrope.backends.holdings import Holdings, chain, root_of
from tightrope.backends.protocol import Capabilities, Chunk, KVUsage, ModelCard
from tightrope.backends.reuse import Accepts, Reuse, Wanted, always

if TYPE_CHECKING:
    from torch import Tensor

BOS, EOS, END_OF_TURN = 256, 257, 258
SPECIAL = {BOS: "<s>", EOS: "</s>", END_OF_TURN: "<|im_end|>"}
VOCAB_SIZE = 259


class ByteTokenizer:
    """One token a byte, three special ones, `added` ones that no flag makes special, and more `special` ones."""

    bos_id = BOS
    adds_bos = True

    def __init__(self, added: Sequence[str] = (), special: Sequence[str] = ()) -> None:
        self.vocab_size = VOCAB_SIZE + len(added) + len(special)
        self.eos_ids = frozenset({EOS, END_OF_TURN})
        self._texts = SPECIAL | dict(enumerate((*added, *special), VOCAB_SIZE))
        self._special = {*SPECIAL, *range(VOCAB_SIZE + len(added), self.vocab_size)}
        self.lost_bytes = b""
        self.max_token_bytes = max(len(text.encode()) for text in self._texts.values())

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        for token_id, found in self._texts.items():
            if found in text and (parse_special or token_id not in self._special):
                before, after = text.split(found, 1)
                head = self.encode(before, parse_special=parse_special, is_start=is_start)
                return [*head, token_id, *self.encode(after, parse_special=parse_special, is_start=False)]
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return self._texts[token_id].encode() if token_id in self._texts else bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_texts(self) -> Sequence[str]:
        return [self._texts[token_id] for token_id in sorted(self._special)]

    def added_texts(self) -> Sequence[str]:
        return [text for token_id, text in self._texts.items() if token_id not in self._special]

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        self._special |= {token_id for token_id, text in self._texts.items() if text in marks}
        self.eos_ids |= {token_id for token_id in self._special if self._texts[token_id] in ends}


@dataclass
class Held:
    """One sequence's tokens in the cache. Cells are shared by being the same number in two lists."""

    namespace: str
    token_ids: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)


class FakeKV:
    """Cells with reference counts, written to be checked against, not to be fast."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.grain = 1
        self.live: dict[int, Held] = {}
        self.kept: list[Held] = []  # least recently used first
        self._holdings: Holdings | None = None
        self._told: dict[bytes, int] = {}  # Blocks, and their places.

    def report_to(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._report()

    def _report(self) -> None:
        """Tell what has changed, by looking at everything."""
        if self._holdings is None:
            return
        held = {
            block: place
            for holder in (*self.live.values(), *self.kept)
            for place, block in enumerate(chain(root_of(b"", holder.namespace), holder.token_ids))
        }
        self._holdings.remove("cached", self._told.keys() - held.keys())
        for block in held.keys() - self._told.keys():
            self._holdings.add("cached", [block], held[block])
        self._told = held

    def _used(self, holders: Sequence[Held]) -> set[int]:
        return {cell for held in holders for cell in (*held.cells, *held.reserved)}

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
        assert seq_id not in self.live
        best: Held | None = None
        length = 0
        for held in (*self.kept, *self.live.values()):
            same = 0
            limit = min(len(held.token_ids), len(token_ids) - 1)
            while (
                reuse != "nothing"
                and held.namespace == namespace
                and same < limit
                and held.token_ids[same] == token_ids[same]
            ):
                same += 1
            if same > length:
                best, length = held, same
        cells = best.cells[:length] if best else []
        self.live[seq_id] = Held(namespace, list(token_ids[:length]), list(cells))
        return Reuse.prefix(length)

    def fetch(self, seq_id: int, token_ids: Sequence[int], namespace: str, *, reuse: Wanted = "exact") -> bool:
        return True

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        held = self.live[seq_id]
        missing = num_tokens - len(held.reserved)
        while missing > 0:
            taken = self._used([*self.live.values(), *self.kept])
            if len(taken) + missing <= self.capacity:
                held.reserved += islice((cell for cell in range(self.capacity) if cell not in taken), missing)
                return True
            if self.capacity - len(self._used(list(self.live.values()))) < missing:
                return False
            self.kept.pop(0)
            self._report()
        return True

    def commit(self, seq_id: int, start: int, token_ids: Sequence[int]) -> None:
        held = self.live[seq_id]
        assert start == len(held.token_ids), "stored where the cache does not end"
        assert len(held.reserved) >= len(token_ids), "stored without room"
        held.cells += held.reserved[: len(token_ids)]
        held.reserved = held.reserved[len(token_ids) :]
        held.token_ids += token_ids
        self._report()

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        held = self.live[seq_id]
        del held.token_ids[num_tokens:], held.cells[num_tokens:]
        self._report()

    def close(self, seq_id: int, *, keep: bool) -> None:
        held = self.live.pop(seq_id)
        held.reserved = []
        if keep and held.token_ids:
            self.kept.append(held)
        self._report()

    def leave(self, token_ids: Sequence[int], namespace: str) -> None:
        pass

    def usage(self) -> KVUsage:
        used = self._used(list(self.live.values()))
        return KVUsage(self.capacity, len(used), len(self._used(self.kept) - used), self.grain)

    def check_integrity(self) -> None:
        holders = [*self.live.values(), *self.kept]
        assert all(len(held.cells) == len(held.token_ids) for held in holders), "a token without a cell"
        assert not any(held.reserved for held in self.kept), "room that is kept for nobody"
        reserved = [cell for held in holders for cell in held.reserved]
        stored = {cell for held in holders for cell in held.cells}
        assert len(stored) + len(reserved) == len(stored | {*reserved}) <= self.capacity, "a cell given away twice"
        beginnings: dict[int, int] = {}
        for held in holders:
            beginning = hash(held.namespace)
            for cell, token_id in zip(held.cells, held.token_ids, strict=True):
                beginning = hash((beginning, token_id))
                assert beginnings.setdefault(cell, beginning) == beginning, "a cell shared by what differs"


def letters(token_ids: Sequence[int]) -> int:
    """A next token that depends on every token before it; never special."""
    digest = 0
    for token_id in token_ids:
        digest = (digest * 31 + token_id + 7) % 1_000_003
    return ord("a") + digest % 26


def script(text: str | bytes | Sequence[int], *, end: int | None = EOS) -> Callable[[Sequence[int]], int]:
    """A model that answers any prompt which ends in "?" with `text` and its end token (or the text again)."""
    answer = [*(text.encode() if isinstance(text, str) else text), *([end] if end is not None else [])]

    def next_token(token_ids: Sequence[int]) -> int:
        asked = max((i for i, token_id in enumerate(token_ids) if token_id == ord("?")), default=-1)
        return answer[(len(token_ids) - 1 - asked) % len(answer)]

    return next_token


class FakeAdapters:
    """Adapters that are there when their files are; they change nothing. `in_place` are their names."""

    def __init__(self) -> None:
        self.in_place: set[str] = set()
        self._fingerprints: dict[str, str] = {}

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        if not path.is_file():
            raise BackendError(f"{path}: no adapter")
        self._fingerprints[name] = fingerprint(path)
        return lambda: self.in_place.add(name)

    def fingerprint(self, name: str) -> str:
        return self._fingerprints.get(name, name)

    def tokenizer(self, name: str) -> None:
        return None

    def remove(self, name: str) -> None:
        self.in_place.discard(name)


class FakeBackend:
    """A loaded model whose logits single out `next_token(all tokens so far)`."""

    def __init__(
        self,
        next_token: Callable[[Sequence[int]], int] = letters,
        *,
        capacity: int = 4096,
        max_model_len: int = 1024,
        max_num_seqs: int = 8,
        max_step_tokens: int = 64,
        max_prompt_rows: int = 0,
        added: Sequence[str] = (),
        special: Sequence[str] = (),
    ) -> None:
        self.card = ModelCard("fake", "rules", "fake", max_model_len, max_model_len, "f16", None, ())
        self.capabilities = Capabilities(max_num_seqs, max_step_tokens, max_prompt_rows or max_step_tokens)
        self.kv = FakeKV(capacity)
        self.tokenizer = ByteTokenizer(added, special)
        self.adapters = FakeAdapters()
        self.steps: list[list[Chunk]] = []
        self.broken: str | None = None
        self._next_token = next_token

    def forward(self, chunks: Sequence[Chunk]) -> "Tensor":
        import torch  # here, since it takes seconds to import

        assert chunks
        if self.broken is not None:
            raise BackendError(self.broken)
        self.steps.append(list(chunks))
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self.capabilities.max_step_tokens
        scored = [chunk for chunk in chunks if chunk.want_logits == "all"]
        assert sum(len(chunk.token_ids) for chunk in scored) <= self.capabilities.max_prompt_rows
        rows = []
        for chunk in chunks:
            held = self.kv.live[chunk.seq_id]
            assert len(held.token_ids) == chunk.start, "runs where the cache does not end"
            assert len(held.reserved) >= len(chunk.token_ids), "runs without room"
            so_far = list(held.token_ids)
            for position, token_id in enumerate(chunk.token_ids):
                so_far.append(token_id)
                is_last = position == len(chunk.token_ids) - 1
                if chunk.want_logits == "all" or (chunk.want_logits == "last" and is_last):
                    rows.append(self._row(so_far))
        return torch.stack(rows) if rows else torch.empty(0, self.tokenizer.vocab_size)

    def _row(self, so_far: Sequence[int]) -> "Tensor":
        import torch

        row = torch.zeros(self.tokenizer.vocab_size)
        row[self._next_token(so_far)] = 20.0
        return row

    def close(self) -> None:
        self.kv.check_integrity()
        self.is_closed = True
