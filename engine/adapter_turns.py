"""Whose turn it is, where a step can't mix adapters: one adapter at one scale runs, and then the next one."""

import logging
from collections.abc import Iterable

from tightrope.engine.sequence import AdapterUse, Sequence

log = logging.getLogger("tightrope.engine")

# How long a turn lasts. To change the adapter costs llama.cpp a plan of its next step: 5 ms for a model of 135M
# parameters on two cores, as much as most of a step; for a large model it is little, and each step may be a turn.
TURN_S = 0.05


class AdapterTurns:
    """A line of adapter uses; the one in front runs, and goes to the end when its turn is over."""

    def __init__(self) -> None:
        self._line: list[AdapterUse] = []
        self._current: AdapterUse = None
        self._began_s = 0.0
        self._is_told = False

    def order(self, sequences: Iterable[Sequence], now_s: float) -> list[AdapterUse]:
        """The uses of these sequences, in the order in which to look for work."""
        present = dict.fromkeys(sequence.adapter_use for sequence in sequences)
        self._line = [use for use in self._line if use in present]
        self._line += [use for use in present if use not in self._line]
        if self._line[:1] == [self._current] and now_s - self._began_s >= TURN_S:
            self._line.append(self._line.pop(0))
        if len(self._line) > 1 and not self._is_told:
            log.info("answers with different adapters take turns: this model's runner can't mix them in one step")
            self._is_told = True
        return list(self._line)

    def take(self, use: AdapterUse, now_s: float) -> None:
        """Record that a step of this use runs now; those before it had no work that could run."""
        if use != self._current:
            self._current, self._began_s = use, now_s
            self._line.remove(use)
            self._line.insert(0, use)
