"""What a cache found of a prompt: runs of its tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

CacheReuse = Literal["exact", "moved"]  # "moved" takes what was computed at other places too, which comes close.
Wanted = Literal["nothing", "exact", "moved"]


@dataclass(frozen=True, slots=True)
class Run:
    """Cached tokens start .. start + length of a prompt, which stood at `source` where they were computed.

    is_exact: they are what computing them here would give. Otherwise they come close to it, because other tokens than
    the prompt's stood before them.
    """

    source: int
    start: int
    length: int
    is_exact: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Reuse:
    """Runs in the order of their places in the prompt, none upon another. A prefix is one exact run at 0."""

    runs: tuple[Run, ...] = ()

    @classmethod
    def prefix(cls, length: int) -> "Reuse":
        """The first `length` tokens, where they were before."""
        return cls((Run(0, 0, length),) if length else ())

    @property
    def num_tokens(self) -> int:
        return sum(run.length for run in self.runs)

    @property
    def num_inexact(self) -> int:
        return sum(run.length for run in self.runs if not run.is_exact)

    @property
    def stop(self) -> int:
        """Where the last run ends."""
        return self.runs[-1].stop if self.runs else 0

    def before(self, place: int) -> "Reuse":
        """What is found of the prompt's first `place` tokens."""
        return Reuse(
            tuple(replace(run, length=min(run.stop, place) - run.start) for run in self.runs if run.start < place)
        )

    def removals(self) -> list[int]:
        """The places of a prompt up to which it is what a cached sequence was, before this lost tokens there."""
        pairs = pairwise((Run(0, 0, 0), *self.runs))
        return [run.stop for run, after in pairs if after.source - after.start != run.source - run.start]

    def missing(self, num_tokens: int) -> list[range]:
        """The places of a prompt of so many tokens that no run holds, as rising ranges."""
        starts = [0, *(run.stop for run in self.runs)]
        stops = [*(run.start for run in self.runs), num_tokens]
        return [range(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


Accepts = Callable[[Reuse], int]  # In so many of a prompt's first tokens, those that come close are better than none.


def always(reuse: Reuse) -> int:
    """Accepts whatever is found."""
    return reuse.stop
