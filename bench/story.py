"""A role-play chat as a front end sends it, turn by turn, once it has filled its window."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from bench.english import english_text

MESSAGE_CHARS = 300, 900  # about 60 to 200 tokens of this text each
CARD_CHARS = 2200
NOTE = "[Note: keep to the point, and let the weather turn.]"
LORE = "The lighthouse was built by the grandmother of Mira, who kept the book of ships before her. "
DEPTH = 4  # A note stands before so many of the last messages.
NOTED = "a note at depth 4"
OTHERS = ("a swipe", NOTED, NOTED, "a lore entry", "without it", "another card", "the first card")

Role = str
Message = tuple[Role, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt. `what` says how it differs from the one before, beside the messages that the window has lost."""

    what: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in self.messages)
        return f"{written}<|im_start|>assistant\n"


def story(window: int, num_turns: int, count: Callable[[str], int]) -> Iterator[Turn]:
    """Prompts of at most `window` tokens: the first fills it, and each of the others has a message and an answer more.

    OTHERS come in the last quarter: a swipe (the same prompt again), a note at a depth, a lore entry that comes and
    goes, and two cards that take turns. count: tokens of a text.
    """
    text, draw = english_text(), Random(1)
    cards = [f"You are {name}, who keeps a harbour. {text[i * CARD_CHARS :][:CARD_CHARS]}" for i, name in
             enumerate(("Mira", "Joren"))]  # fmt: skip
    place = len(cards) * CARD_CHARS

    def message(role: Role) -> Message:
        nonlocal place
        length = draw.randint(*MESSAGE_CHARS)
        begin, place = place, place + length
        return role, text[begin:place]

    def turn(what: str) -> Turn:
        """With as many of the messages as fit; the others are gone."""
        card = ("system", cards[what == "another card"])
        while True:
            shown = [*kept[:-DEPTH], ("system", NOTE), *kept[-DEPTH:]] if what == NOTED else kept
            found = Turn(what, (card, *((("system", LORE),) if what == "a lore entry" else ()), *shown))
            if count(found.text) <= window:
                return found
            del kept[0]

    kept: list[Message] = []
    while count(Turn("", (("system", cards[0]), *kept)).text) < window:
        kept.append(message("assistant" if len(kept) % 2 else "user"))
    yield turn("cold")
    plain = (num_turns - 1) * 3 // 4
    for number in range(num_turns - 1):
        what = "the oldest go" if number < plain else OTHERS[(number - plain) % len(OTHERS)]
        if what != "a swipe":
            kept.append(message("user" if kept[-1][0] == "assistant" else "assistant"))
        yield turn(what)
