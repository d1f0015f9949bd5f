"""Prompts as the simulation sees them: messages with a name and a length, and what any chain of them is called."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """`key` stands for its content: two of the same key are the same tokens."""

    key: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages in their order; `chain` names each together with all before it, as an engine's pages are named."""

    messages: tuple[Message, ...]
    chain: tuple[int, ...]
    num_tokens: int

    @classmethod
    def of(cls, messages: Iterable[Message]) -> "Prompt":
        found = tuple(messages)
        chain, place = [], 0
        for message in found:
            place = behind(place, message.key)
            chain.append(place)
        return cls(found, tuple(chain), sum(message.tokens for message in found))


def behind(place: int, key: int) -> int:
    """The name of a message behind what is called `place`; 0 is the beginning. The same in every process."""
    return hash((place, key))
