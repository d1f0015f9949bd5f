"""What a cache has told of its blocks, checked against what it holds."""

from collections.abc import Iterable, Sequence

from tightrope.backends.holdings import HASH_BYTES, Holdings, News, chain


class Told:
    """Takes in all news of a cache and its store."""

    def __init__(self) -> None:
        self.holdings = Holdings()
        self.cached: set[bytes] = set()
        self.stored: set[bytes] = set()

    def update(self) -> None:
        for blocks, news in zip((self.cached, self.stored), self.holdings.take(), strict=True):
            take_in(blocks, news)


def take_in(blocks: set[bytes], news: News) -> None:
    added, removed = split(news.added), split(news.removed)
    assert len({*added, *removed}) == len(added) + len(removed), "no block is told of twice"
    if news.is_whole:
        blocks.clear()
    assert blocks.issuperset(removed)
    assert blocks.isdisjoint(added)
    blocks.difference_update(removed)
    blocks.update(added)


def split(blocks: bytes) -> list[bytes]:
    return [blocks[start : start + HASH_BYTES] for start in range(0, len(blocks), HASH_BYTES)]


def blocks_of(texts: Iterable[tuple[bytes, Sequence[int]]]) -> set[bytes]:
    """Those of texts, each with what stands before it."""
    return {block for root, token_ids in texts for block in chain(root, token_ids)}
