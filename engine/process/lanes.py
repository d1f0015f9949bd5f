"""Jobs that run beside the reader, where a short one never waits for a long one to end."""

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count

Job = Callable[[], None]

SHORT_BYTES = 1 << 16  # They take a tokenizer some 20 ms.
BYTES_PER_S = 1e6  # Tokenizers read about so many.


class Lanes:
    """Two threads, one for short jobs and one for long ones.

    In each, a job waits at its start for those alone that came before it, or not later than in the time that it takes
    itself: short ones pass longer ones, and none is passed for ever.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = count()
        self._changed = threading.Condition()
        self._waiting: dict[str, list[tuple[float, int, Job]]] = {"short jobs": [], "long jobs": []}
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(waiting,), name=name, daemon=True)
            for name, waiting in self._waiting.items()
        ]
        for thread in self._threads:
            thread.start()

    def put(self, num_bytes: int, job: Job) -> None:
        """Have a job run soon that reads so many bytes. It must not raise."""
        waiting = self._waiting["short jobs" if num_bytes <= SHORT_BYTES else "long jobs"]
        with self._changed:
            heapq.heappush(waiting, (self._clock() + num_bytes / BYTES_PER_S, next(self._numbers), job))
            self._changed.notify_all()

    def close(self) -> None:
        """Forget what has not begun, and wait for what has."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, waiting: list[tuple[float, int, Job]]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: waiting or self._is_closed)
                if self._is_closed:
                    return
                job = heapq.heappop(waiting)[-1]
            job()
            del job  # It may hold a long text.
