"""What a replica holds: its cache, the machine's memory behind that, and a disk, each giving up what is oldest."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

from bench.fleet.prompts import Message, Prompt, behind

Told = Callable[[int, bool], None]  # the name of a message in its chain, and whether it is there from now on


class Tier:
    """Messages by their names in chains, the least recently used first; `where` finds one without what stands before.

    Whoever touches a chain touches its end first, so that what goes first is an end always.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.messages: OrderedDict[int, Message] = OrderedDict()
        self.where: dict[int, int] = {}

    def put(self, place: int, message: Message) -> None:
        if place not in self.messages:
            self.used += message.tokens
            self.messages[place] = message
        self.messages.move_to_end(place)
        self.where[message.key] = place

    def oldest_first(self, place: int) -> None:
        if place in self.messages:
            self.messages.move_to_end(place, last=False)

    def give_up(self) -> tuple[int, Message]:
        place, message = self.messages.popitem(last=False)
        self.used -= message.tokens
        if self.where.get(message.key) == place:
            del self.where[message.key]
        return place, message

    def clear(self) -> None:
        self.messages.clear()
        self.where.clear()
        self.used = 0


class Disk(Tier):
    """One that several replicas may share; what is written can be read some seconds later."""

    def __init__(self, capacity: int, lag_s: float = 2.0) -> None:
        super().__init__(capacity)
        self._lag_s = lag_s
        self._ready_s: dict[int, float] = {}

    def write(self, prompt: Prompt, now_s: float) -> None:
        for place, message in zip(reversed(prompt.chain), reversed(prompt.messages), strict=True):
            if place not in self.messages:
                self._ready_s[place] = now_s + self._lag_s
            self.put(place, message)
        while self.used > self.capacity:
            self._ready_s.pop(self.give_up()[0])

    def has(self, place: int, now_s: float) -> bool:
        return self._ready_s.get(place, now_s + 1) <= now_s

    def first_tokens(self, prompt: Prompt, now_s: float) -> int:
        """How many tokens of a prompt's beginning can be read."""
        there = takewhile(lambda pair: self.has(pair[0], now_s), zip(prompt.chain, prompt.messages, strict=True))
        return sum(message.tokens for _, message in there)


@dataclass(slots=True)
class Found:
    """Tokens of a prompt by where they were found; `moved` of them stood elsewhere. The rest is computed."""

    cached: int = 0
    host: int = 0
    disk: int = 0
    moved: int = 0
    again: int = 0  # of the moved ones; these are computed all the same
    from_places: list[int] = field(default_factory=list)  # where the moved ones stood in the cache

    @property
    def total(self) -> int:
        return self.cached + self.host + self.disk


class Held:
    """One replica's. `told` hears what its memory gains and loses."""

    def __init__(self, cache_tokens: int, host_tokens: int, disk: Disk | None, told: Told | None = None) -> None:
        self.cache, self.host = Tier(cache_tokens), Tier(host_tokens)
        self.disk = disk
        self._told = told

    def find(self, prompt: Prompt, now_s: float) -> Found:
        """The longest beginning, and behind it one run of messages that stood elsewhere, as in a full window."""
        found = Found()
        first = 0
        for place, message in zip(prompt.chain, prompt.messages, strict=True):
            if not self._count(found, place, message, now_s):
                break
            first += 1
        if 0 < first < len(prompt.messages):
            self._find_moved(found, prompt, first, now_s)
        return found

    def _find_moved(self, found: Found, prompt: Prompt, first: int, now_s: float) -> None:
        key = prompt.messages[first].key
        tiers = [self.cache, self.host, *([self.disk] if self.disk is not None else [])]
        place = next((tier.where[key] for tier in tiers if key in tier.where), None)
        for number, message in enumerate(prompt.messages[first:]):
            if place is None:
                return
            place = place if number == 0 else behind(place, message.key)
            if not self._count(found, place, message, now_s):
                return
            found.moved += message.tokens
            found.from_places.append(place)

    def _count(self, found: Found, place: int, message: Message, now_s: float) -> bool:
        if place in self.cache.messages:
            found.cached += message.tokens
        elif place in self.host.messages:
            found.host += message.tokens
        elif self.disk is not None and self.disk.has(place, now_s):
            found.disk += message.tokens
        else:
            return False
        return True

    def keep(self, prompt: Prompt, moved_from: list[int]) -> None:
        """The prompt is in the cache now; what its moved messages were moved from goes first."""
        for place in moved_from:
            self.cache.oldest_first(place)
        for place, message in zip(reversed(prompt.chain), reversed(prompt.messages), strict=True):
            if self._told is not None and place not in self.cache.messages and place not in self.host.messages:
                self._told(place, True)
            self.cache.put(place, message)
        while self.cache.used > self.cache.capacity:
            self.host.put(*self.cache.give_up())
        while self.host.used > self.host.capacity:
            place, _ = self.host.give_up()
            if self._told is not None and place not in self.cache.messages:
                self._told(place, False)

    def lose(self) -> None:
        """The process ended: what was in memory is gone."""
        self.cache.clear()
        self.host.clear()
