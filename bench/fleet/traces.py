"""Who asks for what: chats of role-play, agents, leaderboards. Each is a stream of turns, drawn from a seed.

Lengths in tokens and pauses in seconds are stated where they are drawn. They are assumptions about people, not
measurements; what is measured is what the same turns cost.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from bench.fleet.prompts import Message, Prompt


@dataclass(frozen=True, slots=True)
class Scale:
    """How large all is: the window in tokens, and what lengths and pauses are multiplied by."""

    window: int = 4096
    reserve: int = 300  # A prompt leaves so much of the window for an answer.
    lengths: float = 1.0
    pauses: float = 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody asks for, so many seconds after the answer before has ended."""

    prompt: Prompt
    answer: Message
    pause_s: float


class Source:
    """One client's chance, and its messages of contents that nobody else has.

    What it draws depends on its name alone, whoever draws beside it. Catalogs, such as cards, have keys below zero.
    """

    def __init__(self, name: str, scale: Scale) -> None:
        self.draw = random.Random(name)
        self.scale = scale
        self._first = self.draw.getrandbits(40) << 20
        self._count = itertools.count()

    def branch(self) -> "Source":
        """A stream of the same client that runs beside others."""
        return Source(str(self.draw.random()), self.scale)

    def message(self, median: float, spread: float = 0.6, most: float = 1500) -> Message:
        return Message(self._first + next(self._count), self._scaled(_length(self.draw, median, spread, most)))

    def few_tokens(self, most: int) -> Message:
        return Message(self._first + next(self._count), self.draw.randint(1, most))

    def shared(self, message: Message) -> Message:
        return Message(message.key, self._scaled(message.tokens))

    def pause_s(self, least: float, mean: float) -> float:
        return (least + self.draw.expovariate(1 / mean)) * self.scale.pauses

    def has_room(self, messages: list[Message]) -> bool:
        scale = self.scale
        return sum(message.tokens for message in messages) <= scale.window - scale.reserve * scale.lengths

    def _scaled(self, tokens: float) -> int:
        return max(2, round(tokens * self.scale.lengths))


def _length(draw: random.Random, median: float, spread: float, most: float) -> float:
    return min(most, draw.lognormvariate(0, spread) * median)


@cache
def _catalog(name: str, number: int, first: int, median: float, most: float) -> Message:
    return Message(first - number, round(_length(random.Random(f"{name} {number}"), median, 0.5, most)))


def _popular(draw: random.Random, number: int) -> int:
    """One of so many, the first the likeliest, by Zipf's law."""
    return draw.choices(range(number), cum_weights=_zipf(number))[0]


@cache
def _zipf(number: int) -> list[float]:
    return list(itertools.accumulate(1 / (rank + 1) for rank in range(number)))


# ---- role-play ----

NUM_CARDS = 500


def role_play(source: Source, *, is_old: bool) -> Iterator[Turn]:
    """One person's chat: a card, short messages, longer answers, swipes; a full window loses its oldest messages.

    is_old: it may have a past, which nobody has cached.
    """
    draw = source.draw
    card = source.shared(_catalog("card", _popular(draw, NUM_CARDS), -1, 700, 1500))
    past = draw.choice((0, 8, 20, 40, 60)) if is_old else 0
    messages = [source.message(150 if place % 2 else 50) for place in range(past)]
    while draw.random() > 1 / 25:
        messages.append(source.message(50))
        while not source.has_room([card, *messages]):
            del messages[0]
        prompt = Prompt.of((card, *messages))
        pause_s = source.pause_s(5, 25)
        while True:
            answer = source.message(150, 0.4, 280)
            yield Turn(prompt, answer, pause_s)
            if draw.random() > 0.2:
                break
            pause_s = source.pause_s(2, 6)  # a swipe, after a look at the answer
        messages.append(answer)


# ---- agents ----

NUM_HARNESSES = 12


def agent(source: Source, harness: Message, task: Message) -> Iterator[Turn]:
    """One loop of calls and results, each call on top of all before."""
    messages = [harness, task]
    for _ in range(source.draw.randint(4, 12)):
        if not source.has_room(messages):
            return
        answer = source.message(60, 0.5, 200)
        yield Turn(Prompt.of(messages), answer, source.pause_s(0.1, 1.0))
        messages += [answer, source.message(120, 0.7, 600)]


def burst(source: Source) -> list[Iterator[Turn]]:
    """The loops of one task, which run at the same time and share its beginning: a program's system prompt with its
    tools, which it sends with all that its users ask for, and what this one asks for."""
    harness = source.shared(_catalog("harness", _popular(source.draw, NUM_HARNESSES), -100_000, 1500, 2400))
    task = source.message(250, 0.5, 800)
    return [agent(source.branch(), harness, task) for _ in range(source.draw.choice((1, 1, 2, 4)))]


# ---- leaderboards ----

NUM_SUBJECTS = 57


def leaderboard(source: Source) -> Iterator[Turn]:
    """Questions without an end, in any order, each behind the examples of its subject; answers of a few tokens."""
    while True:
        subject = source.shared(_catalog("subject", source.draw.randrange(NUM_SUBJECTS), -200_000, 900, 2200))
        yield Turn(Prompt.of((subject, source.message(90, 0.5, 400))), source.few_tokens(6), 0.0)


# ---- crowds ----


@dataclass(frozen=True, slots=True)
class Crowd:
    """A kind of clients: so many places for them a replica, each with one after the other.

    `next` makes the streams of a place's next client: they run at once, and all end before the next comes, after so
    many seconds on average. has_sessions: they send an id, as `x-session-id`. settles_s: how long it takes until what a
    fleet does depends no more on how it began.
    """

    name: str
    places: float
    next: Callable[[Source, bool], list[Iterator[Turn]]]
    rest_s: float
    has_sessions: bool
    settles_s: float


CROWDS = {
    crowd.name: crowd
    for crowd in (
        Crowd("role-play", 12, lambda source, is_old: [role_play(source, is_old=is_old)], 20, True, 200),
        Crowd("agents", 3, lambda source, is_old: burst(source), 15, True, 100),
        Crowd("leaderboards", 2, lambda source, is_old: [leaderboard(source)], 0, False, 30),
    )
}
