"""Digests: which tokens each replica holds, as an ingress learns it and asks for it.

What goes over the network are hashes of hashes, taken with a key that one ingress and its replicas alone know. Who
reads them without it can't tell whether a text that he guesses is there. A digest that is wrong, late or lost has a
prompt run where more of it must be computed, and changes nothing else: only a replica's own cache says what it reuses.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import blake2b
from itertools import islice
from operator import or_

from msgspec import Struct

from tightrope.backends.holdings import BLOCK, COPY_SHARE, HASH_BYTES, chain, is_told, root_of
from tightrope.engine.process.wire import Held, HeldBlocks
from tightrope.engine.types import cache_namespace


class Digest(Struct, frozen=True, tag="digest"):
    """See Held; its hashes are taken again, with the key of the one who gets this."""

    number: int
    cached: HeldBlocks
    stored: HeldBlocks
    fingerprint: bytes
    read_share: float
    adapters: dict[str, str] | None


class Keyed:
    """Hashes with a key of up to 64 bytes."""

    def __init__(self, key: bytes) -> None:
        self._empty = blake2b(key=key, digest_size=HASH_BYTES)

    def __call__(self, block: bytes) -> bytes:
        digest = self._empty.copy()
        digest.update(block)
        return digest.digest()


def split(blocks: bytes) -> Iterator[bytes]:
    """The hashes in a row of them."""
    return (blocks[start : start + HASH_BYTES] for start in range(0, len(blocks), HASH_BYTES))


class ReplicaHoldings:
    """What the engine beside this relay has told of itself."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._blocks: tuple[set[bytes], set[bytes]] = set(), set()  # Those that are cached, and those that are stored.
        self._strides = [1, 1]
        self._last: Held | None = None
        self._adapters: dict[str, str] = {}

    def apply(self, held: Held) -> bool:
        """Take in what the engine tells; False after a gap: it is to be asked to tell everything."""
        if not _follows(self._number, held):
            self._number = None
            return False
        for kind, news in enumerate((held.cached, held.stored)):
            if news.is_whole:
                self._blocks[kind].clear()
            self._blocks[kind].difference_update(split(news.removed))
            self._blocks[kind].update(split(news.added))
            self._strides[kind] = news.stride
        self._number, self._last = held.number, held
        self._adapters = self._adapters if held.adapters is None else held.adapters
        return True

    def snapshot(self, key: bytes) -> Digest | None:
        """All of it, for an ingress that has just come; None before the engine has told anything."""
        if self._last is None:
            return None
        cached, stored = (
            HeldBlocks(True, stride, b"".join(blocks), b"")
            for blocks, stride in zip(self._blocks, self._strides, strict=True)
        )
        last = self._last
        held = Held(last.number, cached, stored, last.fingerprint, last.read_share, self._adapters)
        return _digest(held, Keyed(key))

    def changes(self, held: Held, key: bytes) -> Digest:
        """The same that was applied, for an ingress that has all before it."""
        return _digest(held, Keyed(key))


def _digest(held: Held, keyed: Keyed) -> Digest:
    def blocks(news: HeldBlocks) -> HeldBlocks:
        added, removed = (b"".join(map(keyed, split(part))) for part in (news.added, news.removed))
        return HeldBlocks(news.is_whole, news.stride, added, removed)

    parts = blocks(held.cached), blocks(held.stored)
    return Digest(held.number, *parts, held.fingerprint, held.read_share, held.adapters)


def _follows(number: int | None, news: Held | Digest) -> bool:
    is_whole = news.cached.is_whole and news.stored.is_whole and news.adapters is not None
    return is_whole or (number is not None and news.number == number + 1)


@dataclass(frozen=True, slots=True)
class Found:
    """Of a prompt's first tokens so many are in a replica's cache, and behind them so many more in its store.

    read_share: what a stored token takes to be brought back, of the time to compute it.
    """

    cached: int
    stored: int
    read_share: float = COPY_SHARE


@dataclass(slots=True)
class _Replica:
    bit: int  # A power of two.
    number: int | None = None
    blocks: tuple[set[bytes], set[bytes]] = field(default_factory=lambda: (set(), set()))
    strides: list[int] = field(default_factory=lambda: [1, 1])
    fingerprint: bytes = b""
    adapters: dict[str, str] = field(default_factory=dict)
    read_share: float = COPY_SHARE


class DigestIndex:
    """The digests of all replicas: one walk along a prompt tells of each how much of it is there.

    A hash takes some 200 bytes here, so that a replica takes 13 MB at most, and where they hold the same, less.
    """

    def __init__(self, key: bytes) -> None:
        """key: the one that was given to the replicas."""
        self._keyed = Keyed(key)
        self._replicas: dict[str, _Replica] = {}
        self._names: dict[int, str] = {}  # By bit.
        self._holders: tuple[dict[bytes, int], dict[bytes, int]] = {}, {}  # The bits of those that hold a block.

    @property
    def is_empty(self) -> bool:
        """Whether nobody holds anything."""
        return not any(self._holders)

    def apply(self, name: str, digest: Digest) -> bool:
        """Take in what a replica tells.

        False after a gap: it is to be asked for a snapshot. Until that comes what is known stays.
        """
        replica = self._replicas.get(name) or self._add(name)
        if not _follows(replica.number, digest):
            return False
        for kind, news in enumerate((digest.cached, digest.stored)):
            if news.is_whole:
                self._remove(replica, kind, list(replica.blocks[kind]))
            self._remove(replica, kind, split(news.removed))
            replica.strides[kind] = news.stride
            holders = self._holders[kind]
            for block in split(news.added):
                replica.blocks[kind].add(block)
                holders[block] = holders.get(block, 0) | replica.bit
        replica.number, replica.fingerprint, replica.read_share = digest.number, digest.fingerprint, digest.read_share
        replica.adapters = replica.adapters if digest.adapters is None else digest.adapters
        return True

    def forget(self, name: str) -> None:
        """A replica is gone, or holds something else when it comes back."""
        replica = self._replicas.pop(name, None)
        if replica is not None:
            for kind in range(2):
                self._remove(replica, kind, list(replica.blocks[kind]))
            del self._names[replica.bit]

    def find(
        self, token_ids: Sequence[int], namespace: str = "", adapter: str | None = None, adapter_scale: float = 1.0
    ) -> dict[str, Found]:
        """What each replica holds of a prompt, for those that hold any of it; its last token is never reused.

        namespace, adapter, adapter_scale: as in GenerateRequest.
        """
        found: dict[str, Found] = {}
        for root, bits in self._roots(namespace, adapter, adapter_scale).items():
            cached, stored = self._walk(chain(root, token_ids[:-1]), bits)
            for bit in cached.keys() | stored.keys():
                name = self._names[bit]
                num_cached = BLOCK * cached.get(bit, 0)
                num_more = max(0, BLOCK * stored.get(bit, 0) - num_cached)
                found[name] = Found(num_cached, num_more, self._replicas[name].read_share)
        return found

    def end_of(
        self, name: str, token_ids: Sequence[int], namespace: str = "", adapter: str | None = None, scale: float = 1.0
    ) -> bytes | None:
        """What a replica will tell last of a prompt that it has run: see `holds`. None where it tells nothing of it."""
        replica = self._replicas.get(name)
        if replica is None:
            return None
        told = "" if adapter is None else replica.adapters.get(adapter, "")
        root = root_of(replica.fingerprint, cache_namespace(namespace, adapter, told, scale))
        num_blocks = len(token_ids) // BLOCK // replica.strides[0] * replica.strides[0]
        last = deque(islice(chain(root, token_ids), num_blocks), maxlen=1)
        return self._keyed(last[0]) if last else None

    def holds(self, name: str, block: bytes) -> bool:
        """Whether a replica has this block cached, and so all that stands before it."""
        replica = self._replicas.get(name)
        return replica is not None and block in replica.blocks[0]

    def _walk(self, blocks: Iterable[bytes], bits: int) -> tuple[dict[int, int], dict[int, int]]:
        """How many of a text's first blocks each of these replicas has cached, and how many stored, by its bit."""
        lengths: tuple[dict[int, int], dict[int, int]] = {}, {}
        left, strides, num_blocks = [bits, bits], [self._by_stride(kind) for kind in range(2)], 0
        for place, block in enumerate(blocks):
            if not any(left):
                break
            keyed, num_blocks = self._keyed(block), place + 1
            for kind in range(2):
                gone = left[kind] & ~self._holders[kind].get(keyed, 0)
                if gone:
                    gone &= reduce(or_, (those for stride, those in strides[kind].items() if is_told(place, stride)), 0)
                    left[kind] &= ~gone
                    self._note(lengths[kind], kind, gone, place)
        for kind in range(2):
            self._note(lengths[kind], kind, left[kind], num_blocks)
        return lengths

    def _note(self, lengths: dict[int, int], kind: int, bits: int, num_blocks: int) -> None:
        """These hold so many blocks of a text, of which each tells one in its stride."""
        while bits and num_blocks:
            bit = bits & -bits
            bits ^= bit
            stride = self._replicas[self._names[bit]].strides[kind]
            if num_blocks >= stride:
                lengths[bit] = num_blocks // stride * stride

    def _by_stride(self, kind: int) -> dict[int, int]:
        by_stride: dict[int, int] = {}
        for replica in self._replicas.values():
            stride = replica.strides[kind]
            by_stride[stride] = by_stride.get(stride, 0) | replica.bit
        return by_stride

    def _roots(self, namespace: str, adapter: str | None, adapter_scale: float) -> dict[bytes, int]:
        """What texts of a namespace begin with, and the replicas for which it is that: one, while all run the same."""
        alike: dict[tuple[bytes, str], int] = {}
        for replica in self._replicas.values():
            told = "" if adapter is None else replica.adapters.get(adapter)
            if told is not None:
                alike[replica.fingerprint, told] = alike.get((replica.fingerprint, told), 0) | replica.bit
        return {
            root_of(model, cache_namespace(namespace, adapter, told, adapter_scale)): bits
            for (model, told), bits in alike.items()
        }

    def _add(self, name: str) -> _Replica:
        bit = 1
        while bit in self._names:
            bit <<= 1
        self._names[bit] = name
        replica = self._replicas[name] = _Replica(bit)
        return replica

    def _remove(self, replica: _Replica, kind: int, blocks: Iterable[bytes]) -> None:
        holders = self._holders[kind]
        for block in blocks:
            if block in replica.blocks[kind]:
                replica.blocks[kind].remove(block)
                others = holders[block] & ~replica.bit
                if others:
                    holders[block] = others
                else:
                    del holders[block]
