"""In which steps a sequence is computed: told while it runs, and followed when another engine goes on with it.

Logits of a token that runs in another batch are rounded otherwise in their last bits, and so are its keys and values.
So an answer that is the same text each time goes on as the same text only from tokens that ran in the same steps.
"""

from collections.abc import Sequence

from tightrope.engine.track import Shares, Track
from tightrope.engine.types import Layout

FREE = Layout(is_exact=False)


class Steps:
    """The steps of one sequence so far, for its `Layout`."""

    def __init__(self, tracks: Sequence[Track], *, is_exact: bool) -> None:
        """is_exact: its text is to be the same each time."""
        self._tracks = tracks
        self._is_exact = is_exact
        self._found: tuple[int, ...] = ()
        self._sizes: list[tuple[int, ...]] = []
        self._has_changed = True

    def begin(self) -> None:
        """It has been opened in the cache, where much of it was found or nothing."""
        self._found = tuple(len(track.token_ids) - track.pending.count for track in self._tracks)
        self._is_exact = self._is_exact and all(len(track.pending.ranges) == 1 for track in self._tracks)
        self._sizes.clear()
        self._has_changed = True

    def add(self, shares: Shares, *, is_alone: bool, is_decode: bool) -> None:
        """It was part of a step. Beside others nothing is promised of it."""
        if not self._is_exact or (is_alone and is_decode):
            return
        if is_alone:
            self._sizes.append(tuple(share for _, share in shares))
        else:
            self._is_exact = False
            self._sizes.clear()
        self._has_changed = True

    def news(self) -> Layout | None:
        """How it was computed; None where that has been told."""
        if not self._has_changed:
            return None
        self._has_changed = False
        return Layout(True, self._found, tuple(self._sizes)) if self._is_exact else FREE


class Replay:
    """The steps that another engine ran, for a sequence that is alone as it was then."""

    def __init__(self, layout: Layout) -> None:
        ends = [layout.found]
        for step in layout.steps:
            ends.append(tuple(end + share for end, share in zip(ends[-1], step, strict=True)))
        self._ends = ends  # Of each track its steps ended there; the first is what had been found.

    def next(self, tracks: Sequence[Track], num_free: int, most: int) -> Shares | None:
        """What runs next of tracks that have more than one token pending; None is one token of each.

        num_free: so many tokens of what the other engine had found may run, for it had not computed them. most: a step
        takes so many.
        """
        places = [len(track.token_ids) - track.pending.count for track in tracks]
        for number, ends in enumerate(self._ends):
            if all(place >= end for place, end in zip(places, ends, strict=True)):
                continue
            left = most if number else num_free
            shares: Shares = []
            for track, place, end in reversed(list(zip(tracks, places, ends, strict=True))):
                share = max(0, min(end - place, track.pending.count, left))
                shares.insert(0, (track, share))
                left -= share
            return shares
        return None
