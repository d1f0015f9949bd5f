"""Paying back what moved tokens have lent: while nothing else runs, they are computed again, exactly.

An answer over moved tokens comes close to that over exact ones, and what is computed over it later does so too. The
cache lets exact tokens take the place of the others as they are stored, so a pause at any step loses nothing.
"""

import logging
from array import array
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from tightrope.backends.protocol import Chunk, KVCache
from tightrope.backends.reuse import Reuse
from tightrope.engine.sequence import AdapterUse, Sequence
from tightrope.engine.settings import Heal
from tightrope.engine.step_budget import PrefillRate
from tightrope.engine.track import Track

log = logging.getLogger("tightrope.engine")

MOST_AUTO_S = 60.0  # What is estimated to take longer is left as it is, unless it is to be healed always.
MOST_CHATS = 16  # So many wait at most; the latest goes first, since its next turn is likeliest.
MIN_STEP = 64  # The weights are read once for at least so many tokens, whose products take far longer than that.
SEQ_ID = -1  # No track has it.
NUM_COMPARED = 32  # A chat goes on where so many tokens at the end of its last prompt stand in the next one.


@dataclass(frozen=True, slots=True)
class _Chat:
    """An answer that was written over moved tokens: its tokens that are stored, and who may share them."""

    token_ids: list[int]
    num_prompt: int
    namespace: str
    adapter: AdapterUse

    def goes_on_in(self, other: "_Chat") -> bool:
        """Whether `other` is a later turn, or another answer to the same prompt."""
        if (self.namespace, self.adapter) != (other.namespace, other.adapter):
            return False
        end = array("i", self.token_ids[max(0, self.num_prompt - NUM_COMPARED) : self.num_prompt])
        return end.tobytes() in array("i", other.token_ids).tobytes()


class Healing:
    """Chats that wait to be healed, and the one that is, whose sequence is open between two steps of it."""

    def __init__(self, kv: KVCache, rate: PrefillRate, max_step_tokens: int, heal: Heal) -> None:
        self._kv, self._rate, self._heal = kv, rate, heal
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[_Chat] = deque(maxlen=MOST_CHATS)  # The latest stands last.
        self._track: Track | None = None  # It is of the last of them, while its sequence is open.
        self.num_tokens = 0  # So many were computed again.

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Have what an answer holds of moved tokens, and what was computed over them, computed again, or left."""
        for track in sequence.tracks:
            if track.num_inexact:
                stored = track.token_ids[: track.pending.ranges[0].start] if track.pending.ranges else track.token_ids
                num_prompt = min(len(stored), sequence.num_prompt)
                chat = _Chat(list(stored), num_prompt, sequence.namespace, sequence.adapter_use)
                self.pause()
                for other in [other for other in self._waiting if other.goes_on_in(chat)]:
                    self._waiting.remove(other)
                self._waiting.append(chat)

    def pause(self) -> None:
        """Let go of the cache: whatever is healed stays so, and the rest is found as before."""
        if self._track is not None:
            self._kv.close(SEQ_ID, keep=True)
            self._track = None

    def keep_adapters(self, adapters: Collection[str | None]) -> None:
        """Leave chats as they are that use other adapters than these."""
        self.pause()
        for chat in [chat for chat in self._waiting if chat.adapter is not None and chat.adapter[0] not in adapters]:
            self._waiting.remove(chat)

    def give_up(self) -> None:
        """Leave the chat that is being healed as it is."""
        self.pause()
        self._waiting.pop()

    def next(self, seconds: float) -> Chunk | None:
        """What to run in a step of about so long; None when nothing is left to heal. Then tell `commit`."""
        while self._waiting:
            if self._track is None and not self._open():
                chat = self._waiting[-1]
                self.give_up()
                self._kv.leave(chat.token_ids, chat.namespace)
                continue
            assert self._track is not None
            usage = self._kv.usage()
            num_free = usage.capacity - usage.used - usage.reusable
            most = max(MIN_STEP, min(self._rate.tokens_in(seconds), num_free))
            (places,) = self._track.pending.first(min(most, self._max_step_tokens))
            if self._kv.reserve(SEQ_ID, len(places)):
                adapter, scale = self._waiting[-1].adapter or (None, 1.0)
                token_ids = self._track.token_ids[places.start : places.stop]
                return Chunk(SEQ_ID, token_ids, places.start, "none", adapter, scale)
            self.give_up()
        return None

    def commit(self, chunk: Chunk) -> None:
        """Record that the step has run."""
        assert self._track is not None
        self._track.pending.take(len(chunk.token_ids))
        self._kv.commit(SEQ_ID, chunk.start, chunk.token_ids)
        self.num_tokens += len(chunk.token_ids)
        if not self._track.pending.count:
            self.give_up()

    def _open(self) -> bool:
        """Begin with the exact tokens of the chat that is next; False where nothing is to be healed, or too much."""
        chat = self._waiting[-1]
        is_there = False
        if self._heal == "off":
            return False

        def look(reuse: Reuse) -> int:
            nonlocal is_there
            is_there = any(not run.is_exact and run.source == run.start for run in reuse.runs)
            return 0

        self._track = Track(SEQ_ID, chat.token_ids)
        self._track.begin(self._kv.open(SEQ_ID, chat.token_ids, chat.namespace, reuse="moved", accepts=look))
        seconds = self._rate.seconds_of(self._track.pending.count)
        if is_there and self._heal == "auto" and seconds >= MOST_AUTO_S:
            log.info("moved tokens are left as they are: to compute them again would take %.0f s", seconds)
            return False
        return is_there
