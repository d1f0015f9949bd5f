"""An engine tells what it holds to whoever asks, before the step that changed it, and to nobody else."""

import socket
import threading
from collections.abc import Iterator

import pytest
from fakes import FakeBackend, script
from told_blocks import split

from tightrope.backends.holdings import BLOCK, chain, root_of
from tightrope.engine.process.child import serve
from tightrope.engine.process.frames import read_frame
from tightrope.engine.process.wire import (
    Held,
    Loaded,
    Ready,
    SetMarks,
    Start,
    StepDone,
    Submit,
    TellHeld,
    ToEngine,
    ToFront,
    Tokenize,
    Tokenized,
    decode_to_front,
    encode_frame,
)
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import GenerateRequest, StopRules, TokenPrompt, TurnMarks

pytestmark = pytest.mark.quick

PROMPT = tuple(range(60, 110))


class Front:
    """The other end of an engine's socket."""

    def __init__(self) -> None:
        self._sock, self._theirs = socket.socketpair()
        self._reader = self._sock.makefile("rb")
        self.backend = FakeBackend(script("fine"), capacity=128, max_num_seqs=2)
        self._thread = threading.Thread(
            target=serve, args=(self._theirs,), kwargs={"open_backend": lambda settings, progress: self.backend}
        )
        self._thread.start()
        self.send(Start(EngineSettings().model_dump_json()))
        self.until(Loaded)
        self.send(SetMarks(TurnMarks()))
        self.until(Ready)

    def send(self, message: ToEngine) -> None:
        self._sock.sendall(encode_frame(message))

    def until(self, kind: type[ToFront]) -> list[ToFront]:  # type: ignore[valid-type]
        """All messages up to one of this kind."""
        messages: list[ToFront] = []
        while not messages or not isinstance(messages[-1], kind):
            body = read_frame(self._reader)
            assert body is not None
            messages.append(decode_to_front(body))
        return messages

    def answer(self, token_ids: tuple[int, ...], number: int = 0) -> list[ToFront]:
        """All messages up to the end of an answer of some tokens."""
        request = GenerateRequest(f"r{number}", TokenPrompt(token_ids), stop=StopRules(max_tokens=4))
        self.send(Submit(request))
        messages: list[ToFront] = []
        while not any(isinstance(m, StepDone) and any(delta.finish for delta in m.deltas) for m in messages):
            messages += self.until(StepDone)
        return messages

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._reader.close()
        self._sock.close()


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    yield front
    front.close()


def held(messages: list[ToFront]) -> list[Held]:
    return [message for message in messages if isinstance(message, Held)]


def test_nothing_is_told_until_somebody_asks(front: Front) -> None:
    assert held(front.answer(PROMPT)) == []
    front.send(TellHeld())
    (first,) = held(front.until(Held))
    assert (first.number, first.cached.is_whole, first.stored.is_whole, first.adapters) == (0, True, True, {})
    blocks = list(chain(root_of(b"", ""), PROMPT))
    assert {*blocks} == {*split(first.cached.added)}


def test_what_a_step_computes_is_told_before_the_step_is(front: Front) -> None:
    front.send(TellHeld())
    front.until(Held)
    messages = front.answer(PROMPT)
    told = next(i for i, message in enumerate(messages) if isinstance(message, Held))
    word = next(i for i, message in enumerate(messages) if isinstance(message, StepDone) and message.deltas)
    assert told < word
    assert {*split(held(messages)[0].cached.added)} == {*chain(root_of(b"", ""), PROMPT)}


def test_what_is_evicted_is_told_and_a_second_question_begins_anew(front: Front) -> None:
    front.send(TellHeld())
    front.until(Held)
    holds: set[bytes] = set()
    for number in range(4):  # There is room for two.
        for news in held(front.answer((number, *PROMPT), number)):
            holds = holds - {*split(news.cached.removed)} | {*split(news.cached.added)}
    last = [*chain(root_of(b"", ""), (3, *PROMPT))]
    assert holds.issuperset(last)
    assert len(holds) <= 128 // BLOCK
    front.send(TellHeld())
    (again,) = held(front.until(Held))
    assert again.cached.is_whole
    assert again.adapters == {}
    assert {*split(again.cached.added)} == holds


def test_token_ids_can_be_had_without_their_pieces(front: Front) -> None:
    front.send(Tokenize(1, TokenPrompt(PROMPT), is_bare=True))
    tokens = front.until(Tokenized)[-1]
    assert isinstance(tokens, Tokenized)
    assert tuple(tokens.tokens.ids) == PROMPT
    assert tokens.tokens.pieces == {}
