"""What a step is made of: parts of sequences, the chunks that the model runs for them, and where their logits lie."""

from collections.abc import Iterable
from typing import NamedTuple

from tightrope.backends.protocol import Chunk, WantLogits
from tightrope.engine.sequence import Sequence
from tightrope.engine.track import Shares

Rows = list[slice]  # They are rows of the step's logits, for each track of a sequence; empty where none are wanted.


class Work(NamedTuple):
    """One sequence's part of the step: so many of the next tokens of each of its tracks, `num_run` in all.

    is_last: nothing is pending afterwards, so the next token can be drawn. is_scored: the logits of each token of its
    own track are looked at, which takes far longer than to compute them.
    """

    sequence: Sequence
    shares: Shares
    num_run: int
    is_last: bool
    is_scored: bool

    @property
    def is_of_prompt(self) -> bool:
        """Whether it is more than the one token of an answer."""
        return self.num_run > len(self.shares)


def layout(works: Iterable[Work]) -> tuple[list[Chunk], list[Rows]]:
    """The chunks of a step, and for each work the rows of its tracks in the logits that the model returns for them."""
    chunks: list[Chunk] = []
    rows_of: list[Rows] = []
    end = 0
    for work in works:
        sequence, request = work.sequence, work.sequence.request
        last: WantLogits = "last" if work.is_last and request.stop.max_tokens != 0 else "none"
        want: WantLogits = "all" if work.is_scored else last  # Its own track is the first.
        rows: Rows = []
        for track, share in work.shares:
            begin = end
            for places in track.pending.first(share):
                share -= len(places)
                wanted: WantLogits = "none" if want == "last" and share else want
                token_ids = track.token_ids[places.start : places.stop]
                chunks.append(
                    Chunk(track.seq_id, token_ids, places.start, wanted, sequence.adapter, request.adapter_scale)
                )
                end += 1 if wanted == "last" else len(places) if wanted == "all" else 0
            rows.append(slice(begin, end))
            want = last
        rows_of.append(rows)
    return chunks, rows_of
