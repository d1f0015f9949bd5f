"""The other ranks as the first one sees them: processes that it starts, tells what to do, and doesn't outlive.

Each has a thread here, which starts it and then reads what it answers. The system ends a process whose thread here has
gone, however that ended, so that no rank is left behind.
"""

import itertools
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import msgspec

from tightrope.backends.errors import BackendError, DeviceLost, DoesNotFit
from tightrope.backends.hf.ranks.link import Link, Payload
from tightrope.backends.hf.ranks.messages import Answer, Command, Failed
from tightrope.backends.sessions.store import write_rest
from tightrope.processes import child_command, child_environment

log = logging.getLogger("tightrope.hf")

Answered = tuple[Answer, bytearray]
OnLost = Callable[[str], None]
Kind = TypeVar("Kind", bound=Answer)
REST_S = 8.0  # Writing chats may take so long when the engine ends with a rank; see engine/process/child.py.
CLOSE_S = 5.0  # So long a rank may take to end when it is told to.


def end_with_rank(reason: str) -> None:
    """End this process, a rank of which is gone, once what rests of chats is written: nothing is left to tidy up."""
    log.error("engine ends: %s", reason)
    write_rest(REST_S)
    os._exit(1)


class RankProcess:
    """Rank `rank` of `count`, in a process of its own."""

    def __init__(self, rank: int, count: int, memory: int, on_lost: OnLost) -> None:
        """memory: a descriptor that it inherits. on_lost: is called when it ends unasked, once work has begun."""
        self.name = f"rank {rank} of {count}"
        self.has_begun = False  # Whether this process may be waiting for it within a step.
        self._on_lost, self._is_closing = on_lost, False
        self._calls: dict[int, Future[Answered]] = {}
        self._meetings: set[int] = set()
        self._numbers = itertools.count(1)  # 0 is for what isn't answered.
        self._decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        here, there = socket.socketpair()
        self._link = Link(here)
        self._process: subprocess.Popen[bytes] | None = None
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(there, memory, started), name=f"rank-{rank}", daemon=True
        )
        self._thread.start()
        started.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def tell(self, command: Command, payload: Payload = b"") -> None:
        """Have it do something of which nothing comes back. Raises DeviceLost where it has gone."""
        try:
            self._link.send(0, command, payload)
        except OSError as error:
            raise DeviceLost(f"{self.name} is gone") from error

    def ask(self, command: Command, *, do_meet: bool = False) -> "Future[Answered]":
        """Have it do something and answer; the answer is a Failed where it couldn't.

        do_meet: ranks wait for each other within it, so that one that fails is as good as gone.
        """
        call = next(self._numbers)
        if do_meet:
            self._meetings.add(call)
        answered: Future[Answered] = Future()
        self._calls[call] = answered
        try:
            self._link.send(call, command)
        except OSError:
            self._fail(self._how_it_ended())
        return answered

    def close(self) -> None:
        """Let it end, and wait for that."""
        self._is_closing = True
        self._link.close()
        self._thread.join(CLOSE_S)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _run(self, there: socket.socket, memory: int, started: threading.Event) -> None:
        descriptors = there.fileno(), memory
        command = child_command("tightrope.backends.hf.ranks.child", *map(str, descriptors))
        try:
            self._process = subprocess.Popen(
                command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=child_environment()
            )
        finally:
            there.close()
            started.set()
        with suppress(OSError):
            while True:
                call, answer, payload = self._link.receive(self._decoder)
                if isinstance(answer, Failed) and (not call or call in self._meetings):
                    self._lose(f"{self.name} failed: {answer.error}")
                elif (waiting := self._calls.pop(call, None)) is not None:
                    waiting.set_result((answer, payload))
        self._lose(self._how_it_ended())

    def _lose(self, reason: str) -> None:
        if self._is_closing:
            return
        if self.has_begun:
            self._on_lost(reason)
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        """Nothing that was asked is answered any more."""
        for call in list(self._calls):
            if (waiting := self._calls.pop(call, None)) is not None:
                waiting.set_exception(BackendError(reason))

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            return f"{self.name} answers no more"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        return f"{self.name} {how}"


class Ranks:
    """All other ranks, told the same."""

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self.processes = processes

    @classmethod
    def start(cls, count: int, memory: int, on_lost: OnLost) -> "Ranks":
        return cls([RankProcess(rank, count, memory, on_lost) for rank in range(1, count)])

    def begin(self) -> None:
        """From now on steps may wait for the others, so that this process ends when one of them does."""
        for process in self.processes:
            process.has_begun = True

    def tell(self, command: Command) -> None:
        """Have all do something of which nothing comes back. Raises DeviceLost."""
        for process in self.processes:
            process.tell(command)

    def ask(self, command: Command, *, do_meet: bool = False) -> "list[Future[Answered]]":
        """Have all do something at the same time as this process; `answers` waits for them."""
        return [process.ask(command, do_meet=do_meet) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.close()


def answers(asked: "Sequence[Future[Answered]]") -> list[Answered]:
    """What ranks answer, once all have. Raises the BackendError of the first one that failed."""
    found = [waiting.result() for waiting in asked]
    for answer, _ in found:
        if isinstance(answer, Failed):
            raise (DoesNotFit if answer.has_no_room else BackendError)(answer.error)
    return found


def answers_of(kind: type[Kind], asked: "Sequence[Future[Answered]]") -> list[Kind]:
    """The same, of which nothing but messages of one kind comes back."""
    found = [answer for answer, _ in answers(asked)]
    assert all(isinstance(answer, kind) for answer in found)
    return [answer for answer in found if isinstance(answer, kind)]
