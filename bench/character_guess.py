"""A router that guesses from characters which replica holds a prompt: what the exact digest is compared with.

Written from the public description of Ray Serve's PrefixCacheAffinityRouter
(https://docs.ray.io/en/latest/serve/llm/prefix-aware-request-router.html): while the lengths of the replicas' queues
differ by no more than `imbalanced_threshold`, a prompt goes to the replicas that were sent the longest beginning of it,
if that is `match_rate` of it, and else to those that were sent the fewest characters; among these, and among all where
queues differ by more, the shorter queue of two that are drawn is taken. What is sent is put into the tree.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Mapping

MATCH_RATE = 0.1


class CharacterGuess:
    """What each replica was sent, as the sorted texts that a tree of characters would hold."""

    def __init__(self, replicas: list[str], rng: random.Random, imbalanced_threshold: float) -> None:
        self._texts: dict[str, list[str]] = {replica: [] for replica in replicas}
        self._num_characters = dict.fromkeys(replicas, 0)
        self._rng, self._threshold = rng, imbalanced_threshold

    def choose(self, text: str, queue_lengths: Mapping[str, int]) -> str:
        """The replica for a prompt, which is taken down as sent there."""
        candidates = list(queue_lengths)
        if max(queue_lengths.values()) - min(queue_lengths.values()) <= self._threshold:
            matches = {replica: self._match(replica, text) for replica in candidates}
            longest = max(matches.values())
            counts = self._num_characters
            if longest >= MATCH_RATE * len(text):
                candidates = [replica for replica in candidates if matches[replica] == longest]
            else:
                candidates = [r for r in candidates if counts[r] == min(counts.values())]
        drawn = self._rng.sample(candidates, min(2, len(candidates)))
        chosen = min(drawn, key=lambda replica: queue_lengths[replica])
        self._num_characters[chosen] += len(text) - self._match(chosen, text)
        insort(self._texts[chosen], text)
        return chosen

    def _match(self, replica: str, text: str) -> int:
        """How many characters of a text's beginning a replica was sent: those before and after it in order tell."""
        texts = self._texts[replica]
        place = bisect_left(texts, text)
        return max((_num_common(text, other) for other in texts[max(0, place - 1) : place + 1]), default=0)


def _num_common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
