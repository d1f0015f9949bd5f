"""The engine's own watch: tells the front that this process lives, and ends it when its work stands still.

Time is counted in beats of the watch, so that a stop of the whole process (Ctrl-Z, a debugger) is no stand-still.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tightrope.engine.process.wire import Alive, EngineEnd, Start
from tightrope.engine.settings import BEATS, PATIENCE, EngineSettings, LifeSettings
from tightrope.kernels.forms.compiling import compiling

log = logging.getLogger("tightrope.engine")

SLACK = 10.0  # A task may take so many times as long as its tokens should: attention slows down along a prompt.
FIRST_S_PER_TOKEN = 0.1  # It holds before a step has been measured.
MIN_MEASURED = 16  # The time of a smaller step doesn't come from its tokens.


class Task:
    """What a thread is at."""

    def __init__(self, name: str, allowed_s: float, num_tokens: int) -> None:
        self.name = name
        self.allowed_s = allowed_s
        self.num_tokens = num_tokens
        self.began_s = time.monotonic()
        self.num_beats = 0  # The watch alone writes it.


class Activity:
    """One thread's work, a task after another. Its methods are that thread's."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._s_per_token = FIRST_S_PER_TOKEN
        self.task: Task | None = None

    def begin(self, name: str, num_tokens: int = 0) -> None:
        """What was under way is done, or goes on as this. num_tokens: how many the model runs in it."""
        self.task = Task(name, self._patience_s + SLACK * self._s_per_token * num_tokens, num_tokens)

    def end(self) -> None:
        """The thread waits for more."""
        task, self.task = self.task, None
        if task is not None and task.num_tokens >= MIN_MEASURED:
            self._s_per_token = 0.7 * self._s_per_token + 0.3 * (time.monotonic() - task.began_s) / task.num_tokens


class Watch:
    """A thread with signs of life for the front, and an eye on what its threads do."""

    def __init__(self, end: EngineEnd, settings: LifeSettings, on_end: Callable[[int], None]) -> None:
        """on_end is called from the thread, at most once, with the status that the process should end with."""
        self._end = end
        self._beat_s = settings.stuck_s / BEATS
        self._patience_s = settings.stuck_s * PATIENCE
        self._on_end = on_end
        self._activities: list[Activity] = []
        self._is_over = threading.Event()

    def activity(self) -> Activity:
        """What one more thread does."""
        activity = Activity(self._patience_s)
        self._activities.append(activity)
        return activity

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Watch over one piece of work."""
        activity = self.activity()
        activity.begin(name)
        try:
            yield
        finally:
            self._activities.remove(activity)

    def start(self) -> None:
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(self._beat_s):
            if self._end.is_front_gone():  # While a model loads nobody else would notice.
                self._on_end(0)
                return
            for task in [activity.task for activity in list(self._activities)]:
                if task is None:
                    continue
                task.num_beats += 1
                if task.num_beats * self._beat_s > task.allowed_s:
                    log.error(
                        "engine is stuck: task=%s tokens=%d seconds>%.0f", task.name, task.num_tokens, task.allowed_s
                    )
                    self._on_end(1)
                    return
            self._end.send(Alive(compiling.is_under_way))


def run_watched(
    sock: socket.socket,
    on_end: Callable[[int], None],
    run: Callable[[EngineEnd, Start, EngineSettings, Watch], int],
) -> int:
    """What a process of an engine does from its first message on, watched; return the exit status.

    It is 0 where the front has gone before it said anything. on_end: see Watch.
    """
    end = EngineEnd(sock)
    try:
        start = end.receive()
        if not isinstance(start, Start):
            return 0
        settings = EngineSettings.model_validate_json(start.settings)
        watch = Watch(end, settings.life, on_end)
        watch.start()
        try:
            return run(end, start, settings, watch)
        finally:
            watch.stop()
    finally:
        end.close()
