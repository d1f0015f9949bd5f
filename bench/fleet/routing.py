"""Who gets a request: the ways that are compared. Each sees what a router in front of the replicas could see."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from bench.fleet.prompts import Prompt
from bench.fleet.requests import Request
from tightrope.server.cluster.choosing import Candidate, choose

DOWN = 1 << 40  # the load of a replica that is not there
OnDisk = Callable[[int, Prompt], int]  # how many of a prompt's first tokens a replica can read from its disk


class Loads:
    """What the router itself has sent where: requests under way, those of them that are being written, and the tokens
    of the others' prompts that it expects to be computed."""

    def __init__(self, number: int, draw: random.Random, most_running: int) -> None:
        self.draw = draw
        self.most_running = most_running
        self.requests = np.zeros(number, dtype=np.int64)
        self.writing = np.zeros(number, dtype=np.int64)
        self.tokens = np.zeros(number, dtype=np.int64)

    def sent(self, replica: int, request: Request) -> None:
        self.requests[replica] += 1
        self.tokens[replica] += request.expected

    def wrote(self, replica: int, request: Request) -> None:
        """Its first token has come."""
        self.writing[replica] += 1
        self.tokens[replica] -= request.expected

    def ended(self, replica: int) -> None:
        self.requests[replica] -= 1
        self.writing[replica] -= 1

    def died(self, replica: int) -> None:
        self.requests[replica] = DOWN
        self.writing[replica] = self.tokens[replica] = 0

    def came_back(self, replica: int) -> None:
        self.requests[replica] = 0

    def is_up(self, replica: int) -> bool:
        return bool(self.requests[replica] < DOWN)

    def least(self, among: np.ndarray | None = None) -> int:
        """One with the fewest requests, of all that are up, or of those replicas."""
        loads = self.requests if among is None else self.requests[among]
        found = np.flatnonzero(loads == loads.min())
        place = int(found[int(self.draw.random() * len(found))])
        return place if among is None else int(among[place])


class Router(Protocol):
    """Chooses, and is told what happens."""

    def choose(self, request: Request, now_s: float) -> int: ...

    def told(self, replica: int, place: int, is_there: bool, now_s: float) -> None:
        """A replica's memory gained or lost a message, called by its place in its chain."""

    def died(self, replica: int) -> None: ...


class Deaf:
    """What routers have that listen to nobody."""

    def __init__(self, loads: Loads) -> None:
        self.loads = loads

    def told(self, replica: int, place: int, is_there: bool, now_s: float) -> None:
        pass

    def died(self, replica: int) -> None:
        pass


class AtRandom(Deaf):
    """By the prompt's name, so that the same requests go the same ways however they follow each other."""

    def choose(self, request: Request, now_s: float) -> int:
        draw = random.Random(f"{request.prompt.chain[-1]} {request.answer.key} {request.num_moves}")
        while True:
            replica = draw.randrange(len(self.loads.requests))
            if self.loads.is_up(replica):
                return replica


class LeastLoaded(Deaf):
    def choose(self, request: Request, now_s: float) -> int:
        return self.loads.least()


class Sticky(Deaf):
    """By the session's name alone, as a consistent hash; the next replica on the ring while its own is down."""

    def choose(self, request: Request, now_s: float) -> int:
        if not request.session:
            return self.loads.least()
        number = len(self.loads.requests)
        first = random.Random(request.session).randrange(number)
        return next(replica for step in range(number) if self.loads.is_up(replica := (first + step) % number))


class CharacterGuess(Deaf):
    """As cache_aware of sglang-router (0.3.2) and vllm-router (0.1.17) with their defaults, which keep what was sent.

    A beginning of more than LEAST_SHARE of the prompt that was sent to a replica decides, otherwise the replica that
    was sent the least text is chosen; where loads differ by more than MOST_APART requests and MOST_TIMES times, the
    least loaded. What a replica has given up meanwhile is not known. Ray Serve's PrefixCacheAffinityRouter (2.60) does
    the same from a tenth of the prompt on, with no bound on the loads by default.
    """

    LEAST_SHARE, MOST_APART, MOST_TIMES = 0.3, 64, 1.5

    def __init__(self, loads: Loads) -> None:
        super().__init__(loads)
        self._sent: dict[int, int] = {}  # bits of the replicas by the name of a message in its chain
        self._texts = np.zeros(len(loads.requests), dtype=np.int64)

    def choose(self, request: Request, now_s: float) -> int:
        prompt = request.prompt
        replica = self._choose(prompt)
        for place, message in zip(prompt.chain, prompt.messages, strict=True):
            bits = self._sent.get(place, 0)
            if not bits >> replica & 1:
                self._sent[place] = bits | 1 << replica
                self._texts[replica] += message.tokens
        return replica

    def _choose(self, prompt: Prompt) -> int:
        loads = self.loads
        up = np.flatnonzero(loads.requests < DOWN)
        most, least = loads.requests[up].max(), loads.requests[up].min()
        if most - least > self.MOST_APART and most > self.MOST_TIMES * least:
            return loads.least()
        found, matched, mask = 0, 0, -1
        for place, message in zip(prompt.chain, prompt.messages, strict=True):
            mask &= self._sent.get(place, 0)
            if not mask:
                break
            found, matched = mask, matched + message.tokens
        if matched > self.LEAST_SHARE * prompt.num_tokens:
            return loads.least(_members(found, len(loads.requests)))
        texts = self._texts[up]
        return loads.least(up[texts == texts.min()])

    def died(self, replica: int) -> None:
        keep = ~(1 << replica)
        self._sent = {place: left for place, bits in self._sent.items() if (left := bits & keep)}
        self._texts[replica] = 0


class ExactDigest:
    """tightrope's own: what each replica says that it holds, after `lag_s`, against its load."""

    MOST_LEVELS, MOST_OF_EACH = 4, 3  # Of those that hold equally much only the least loaded few can be best.

    def __init__(self, loads: Loads, lag_s: float, on_disk: OnDisk) -> None:
        self.loads = loads
        self._lag_s, self._on_disk = lag_s, on_disk
        self._held: dict[int, int] = {}  # bits of the replicas by the name of a message in its chain
        self._coming: deque[tuple[float, int, int, bool]] = deque()
        self._last: dict[str, tuple[int, int, int]] = {}  # replica, name and length of the session's last prompt

    def told(self, replica: int, place: int, is_there: bool, now_s: float) -> None:
        self._coming.append((now_s + self._lag_s, replica, place, is_there))

    def died(self, replica: int) -> None:
        keep = ~(1 << replica)
        self._held = {place: left for place, bits in self._held.items() if (left := bits & keep)}
        self._coming = deque(item for item in self._coming if item[1] != replica)

    def choose(self, request: Request, now_s: float) -> int:
        self._listen(now_s)
        loads, prompt = self.loads, request.prompt
        levels = [*self._levels(prompt)]
        last, place, length = self._last.get(request.session, (-1, 0, 0))
        cached = {
            replica: 0 for replica in (last, loads.least(), loads.least()) if replica >= 0 and loads.is_up(replica)
        }
        cached = {replica: self._held_by(replica, levels) for replica in cached} | self._best(levels)
        is_there = last >= 0 and self._held.get(place, 0) >> last & 1
        candidates = [
            Candidate(
                str(replica),
                cached=tokens,
                stored=max(0, self._on_disk(replica, prompt) - tokens),
                queued_tokens=int(loads.tokens[replica]),
                num_running=int(loads.writing[replica]),
                is_full=bool(loads.requests[replica] >= loads.most_running),
                is_session=replica == last,
                session_tokens=length if replica == last and is_there else 0,
                num_queued=int(loads.requests[replica] - loads.writing[replica]),
            )
            for replica, tokens in cached.items()
        ]
        replica = int(choose(prompt.num_tokens, candidates, loads.draw))
        known = max(cached[replica], length if replica == last and is_there else 0)
        request.expected = max(1, prompt.num_tokens - known)
        if request.session:
            self._last[request.session] = (replica, prompt.chain[-1], prompt.num_tokens)
        return replica

    def _listen(self, now_s: float) -> None:
        while self._coming and self._coming[0][0] <= now_s:
            _, replica, place, is_there = self._coming.popleft()
            bits = self._held.get(place, 0)
            bits = bits | 1 << replica if is_there else bits & ~(1 << replica)
            if bits:
                self._held[place] = bits
            else:
                self._held.pop(place, None)

    def _held_by(self, replica: int, levels: list[tuple[int, int]]) -> int:
        return next((tokens for mask, tokens in levels if mask >> replica & 1), 0)

    def _best(self, levels: list[tuple[int, int]]) -> dict[int, int]:
        """Tokens by replica, of those that hold most, and of equals of the least loaded."""
        found: dict[int, int] = {}
        for mask, tokens in reversed(levels[-self.MOST_LEVELS :]):
            among = _members(mask, len(self.loads.requests))
            loads = self.loads.requests[among]
            for place in np.argpartition(loads, min(self.MOST_OF_EACH, len(among)) - 1)[: self.MOST_OF_EACH]:
                if loads[place] < DOWN:
                    found.setdefault(int(among[place]), tokens)
        return found

    def _levels(self, prompt: Prompt) -> Iterator[tuple[int, int]]:
        """Which replicas hold so many tokens of the beginning and no more, the fewest tokens first."""
        mask, tokens = 0, 0
        for place, message in zip(prompt.chain, prompt.messages, strict=True):
            there = self._held.get(place, 0)
            there = there & mask if tokens else there
            if tokens and (left := mask & ~there):
                yield left, tokens
            mask = there
            if not mask:
                return
            tokens += message.tokens
        yield mask, tokens


def _members(mask: int, number: int) -> np.ndarray:
    """The replicas whose bits are set, in their order."""
    if mask.bit_count() <= 8:
        found = []
        while mask:
            lowest = mask & -mask
            found.append(lowest.bit_length() - 1)
            mask ^= lowest
        return np.array(found, dtype=np.int64)
    raw = np.frombuffer(mask.to_bytes(-(-number // 8), "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))


ROUTERS = ("random", "least loaded", "session", "character guess", "exact digest")


def router_of(name: str, loads: Loads, lag_s: float, on_disk: OnDisk = lambda replica, prompt: 0) -> Router:
    match name:
        case "random":
            return AtRandom(loads)
        case "least loaded":
            return LeastLoaded(loads)
        case "session":
            return Sticky(loads)
        case "character guess":
            return CharacterGuess(loads)
        case "exact digest":
            return ExactDigest(loads, lag_s, on_disk)
    raise ValueError(name)
