"""What of a stream is yet to be computed."""

from collections.abc import Iterable


class Pending:
    """Places of tokens, as rising ranges: what lies before, between and behind them is computed, or isn't there yet.

    They run in their order, whichever range they are in, so who shares out a step counts tokens and sees no ranges.
    """

    __slots__ = ("count", "ranges")

    def __init__(self, ranges: Iterable[range]) -> None:
        self.ranges = [places for places in ranges if places]
        self.count = sum(map(len, self.ranges))  # It counts all places.

    def append(self, place: int) -> None:
        """Add the place behind all others."""
        start = self.ranges.pop().start if self.ranges and self.ranges[-1].stop == place else place
        self.ranges.append(range(start, place + 1))
        self.count += 1

    def first(self, count: int) -> list[range]:
        """The first `count` places."""
        if count >= self.count:  # All of them, as in each step of an answer.
            return self.ranges[:]
        parts: list[range] = []
        for places in self.ranges:
            if count <= 0:
                break
            parts.append(places[:count])
            count -= len(places)
        return parts

    def take(self, count: int) -> list[range]:
        """The first `count` places, which have run and are gone from here."""
        parts = self.first(count)
        if count >= self.count:
            self.ranges, self.count = [], 0
        elif parts:
            rest = range(parts[-1].stop, self.ranges[len(parts) - 1].stop)
            self.ranges[: len(parts)] = [rest] if rest else []
            self.count -= count
        return parts

    def has_before(self, place: int) -> bool:
        """Whether a token before `place` is yet to be computed."""
        return bool(self.ranges) and self.ranges[0].start < place
