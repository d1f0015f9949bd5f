"""One request on its way through the fleet."""

from dataclasses import dataclass, field

import simpy

from bench.fleet.held import Found
from bench.fleet.prompts import Message, Prompt


@dataclass(slots=True, eq=False)
class Request:
    """Times are the simulation's seconds; `answer` is what the model will have written."""

    prompt: Prompt
    answer: Message
    session: str
    arrived_s: float
    done: simpy.Event | None = None  # None where it is asked of a real server
    expected: int = 0  # prompt tokens that the router expects to be computed
    first_s: float | None = None  # when its first token came
    found: Found = field(default_factory=Found)
    num_written: int = 0
    num_moves: int = 0  # to other replicas, when its own had died


@dataclass(slots=True, eq=False)
class Running:
    """A request on one replica."""

    request: Request
    since_s: float
    left: int = 0  # prompt tokens to be computed
    place: int = 0  # how many tokens stand before these
    restore_s: float = 0.0
    is_started: bool = False

    @property
    def num_tokens(self) -> int:
        """Of the prompt, and of what another replica had written."""
        return self.request.prompt.num_tokens + self.request.num_written

    @property
    def left_to_write(self) -> int:
        return self.request.answer.tokens - self.request.num_written
