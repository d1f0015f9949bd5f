"""The process that embeds: takes texts from the socket, one message after another, and sends their vectors.

It gives way to the chat model: once it is loaded, for which the chat model waits, it has the least priority that there
is, and while answers are being written one thread, which runs where nobody else does.
The front starts it by `python -m tightrope.engine.embedding.child FD`.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tightrope.backends.embedding.opening import open_embedders
from tightrope.backends.embedding.protocol import Embedder
from tightrope.backends.errors import BackendError
from tightrope.backends.settings import ModelSettings
from tightrope.backends.threads import compute_threads
from tightrope.engine.console import log_to_stderr
from tightrope.engine.embedding.texts import embedded
from tightrope.engine.errors import BackendFailed, EngineError
from tightrope.engine.process.watch import Watch, run_watched
from tightrope.engine.process.wire import CallFailed, Embed, EmbedderReady, EngineEnd, ErrorFrame, LoadFailed, Start
from tightrope.engine.settings import EngineSettings

log = logging.getLogger("tightrope.embedding")

LEAST_PRIORITY = 19  # Of Unix' niceness: beside a thread of the chat model one of ours gets a seventieth of the time.

OpenEmbedders = Callable[[ModelSettings], Sequence[Embedder]]


def serve(
    sock: socket.socket,
    on_end: Callable[[int], None] = lambda status: None,
    open_embedders: OpenEmbedders = open_embedders,
    on_loaded: Callable[[], None] = lambda: None,
    on_thread: Callable[[], None] = lambda: None,
) -> int:
    """Embed what comes over the socket until the front closes it; return the exit status.

    on_end: see Watch. on_loaded: is called before the front is told that texts are taken. on_thread: is called by the
    thread that computes while answers are written.
    """

    def run(end: EngineEnd, start: Start, settings: EngineSettings, watch: Watch) -> int:
        try:
            opened = open_embedders(settings.model)
        except BackendError as error:
            end.send(LoadFailed(str(error)))
            return 1
        try:
            on_loaded()
            end.send(EmbedderReady(tuple(embedder.card for embedder in opened)))
            with ThreadPoolExecutor(1, "beside chats", on_thread) as beside:
                _run(end, opened, compute_threads(settings.model.threads), watch, beside)
        finally:
            for embedder in opened:
                embedder.close()
        return 0

    return run_watched(sock, on_end, run)


def _run(end: EngineEnd, opened: Sequence[Embedder], threads: int, watch: Watch, beside: ThreadPoolExecutor) -> None:
    activity = watch.activity()
    while (message := end.receive()) is not None:
        assert isinstance(message, Embed), f"a {type(message).__name__} out of place"
        activity.begin("texts", num_tokens=sum(map(len, message.texts)))  # A text has no more tokens than characters.
        try:
            model = opened[message.model]
            if message.is_busy:
                end.send(beside.submit(embedded, message, model, 1).result())
            else:
                end.send(embedded(message, model, threads))
        except EngineError as error:
            end.send(CallFailed(message.call_id, ErrorFrame.of(error)))
        except Exception as error:
            log.error("texts failed: call_id=%s", message.call_id, exc_info=error)
            reason = " ".join(str(error).split()) or type(error).__name__
            failure = BackendFailed(f"the embedding model failed: {reason:.200}")
            end.send(CallFailed(message.call_id, ErrorFrame.of(failure)))
        activity.end()


def give_way() -> None:
    """Give all threads of this process the least priority; those that they start have it, too."""
    os.setpriority(os.PRIO_PROCESS, 0, LEAST_PRIORITY)
    with suppress(OSError):  # Linux alone tells of those that libraries have started.
        for task in os.scandir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(task.name), LEAST_PRIORITY)


def run_where_nobody_does() -> None:
    """Make the calling thread one that leaves the processor at once to whoever wakes up; it can't be undone.

    A thread of the least priority may go on to the end of its slice, which is milliseconds: as long as a whole step of
    a small chat model, whose threads sleep and wake up with each. On systems without such threads it does nothing.
    """
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the front, which closes the socket when it is done.
    log_to_stderr("info")
    front = socket.socket(fileno=int(sys.argv[1]))
    sys.exit(serve(front, on_end=os._exit, on_loaded=give_way, on_thread=run_where_nobody_does))


if __name__ == "__main__":
    main()
