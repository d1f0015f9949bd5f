"""The engine process: takes requests from the socket, runs the loop, sends what each step brought.

One thread reads the socket, two more tokenize; the main thread runs the model. The front starts it by
`python -m tightrope.engine.process.child FD`; `serve` alone is the same engine inside another process.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from tightrope.backends.detect import open_backend
from tightrope.backends.errors import BackendError, DeviceLost
from tightrope.backends.protocol import Backend
from tightrope.backends.sessions.store import write_rest
from tightrope.backends.settings import ModelSettings
from tightrope.engine.console import log_to_stderr
from tightrope.engine.core import EngineCore
from tightrope.engine.errors import EngineError
from tightrope.engine.info import model_info
from tightrope.engine.process.reader import FrontGone, Reader
from tightrope.engine.process.watch import Activity, Watch, run_watched
from tightrope.engine.process.wire import (
    Cancel,
    EngineEnd,
    ErrorFrame,
    Loaded,
    LoadFailed,
    Loading,
    Progress,
    Ready,
    Refused,
    SetMarks,
    Start,
    StepDone,
)
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import Delta, with_adapter_texts
from tightrope.engine.work import Work

log = logging.getLogger("tightrope.engine")

TELL_S = 0.5  # At least so much time is between two words on how far a load is.
STATS_S = 0.1  # While nobody comes or goes, the front hears the counters so often.
REST_S = 8.0  # Writing chats may take so long when the process is to end: less than the front waits for that.

OpenBackend = Callable[[ModelSettings, Callable[[float], None]], Backend]


def run_loop(core: EngineCore, reader: Reader, end: EngineEnd, activity: Activity) -> None:
    """Step while there is work, wait while there is none, end when the front is gone. `activity` is told what."""
    inbox = reader.inbox
    told, told_s = core.stats(), time.monotonic()  # The front knows this.

    def has_come_or_gone() -> bool:
        return core.num_sequences != (told.num_running, told.num_waiting)

    def tell(deltas: tuple[Delta, ...] = ()) -> None:
        """Say what a step brought. The counters come along where they are news: they'd cost each token some time."""
        nonlocal told, told_s
        reader.held.send()
        is_end = not core.has_work or any(delta.finish is not None for delta in deltas)
        if is_end or has_come_or_gone() or time.monotonic() - told_s >= STATS_S:
            told, told_s = core.stats(), time.monotonic()
            end.send(StepDone(deltas, told))
        else:
            end.send(StepDone(deltas))

    def tell_of_begin(works: list[Work]) -> None:
        """A step may take long; meanwhile the front is to know whom it has taken in, and the watch how many tokens."""
        for sequence in (work.sequence for work in works):
            if not sequence.has_begun:
                sequence.has_begun = True
                end.send(Progress(sequence.request.request_id, "running"))
        activity.begin("step", sum(work.num_run for work in works))
        if has_come_or_gone():
            tell()

    while True:
        while not inbox.empty() or not core.has_work:
            item = inbox.get()
            if isinstance(item, FrontGone):
                return
            activity.begin(type(item).__name__)
            if isinstance(item, Cancel):
                core.cancel(item.request_id)
                if not core.has_work:
                    tell()
            elif isinstance(item, list):
                _add(core, item, end)
                reader.num_taken += len(item)
            else:
                item()
            core.free_adapters()
            reader.held.send()
            activity.end()
        activity.begin("step")
        result = core.step(tell_of_begin)
        core.free_adapters()
        activity.end()
        for request_id, error in result.failed:
            log.error("request failed: request_id=%s error=%s", request_id, error)
            end.send(Refused(request_id, ErrorFrame.of(error)))
        tell((*result.progress, *result.deltas))


def _add(core: EngineCore, sequences: list[Sequence], end: EngineEnd) -> None:
    try:
        core.add(sequences)
    except EngineError as error:
        end.send(Refused(sequences[0].request.request_id, ErrorFrame.of(error)))


def load(
    settings: ModelSettings, open_backend: OpenBackend, tell: Callable[[float], None] = lambda share: None
) -> Backend:
    """Open the model with a progress bar on a terminal; `tell` is called with the share loaded, now and then."""
    told_s = 0.0

    def progress(share: float) -> None:
        nonlocal told_s
        bar.update(max(0.0, 100 * share - bar.n))
        if time.monotonic() - told_s > TELL_S:
            told_s = time.monotonic()
            tell(share)

    with tqdm(
        total=100, desc="loading", unit="%", leave=False, disable=None, bar_format="{desc} {bar} {n:.0f} %"
    ) as bar:
        return open_backend(settings, progress)


def serve(
    sock: socket.socket, on_end: Callable[[int], None] = lambda status: None, open_backend: OpenBackend = open_backend
) -> int:
    """Run an engine over the socket until the front closes it, or it can't be read; return the exit status.

    `on_end` is called with it at once where nothing is to be tidied up: from another thread, possibly while a step
    runs, or from this one when the device is lost.
    """

    def run(end: EngineEnd, start: Start, settings: EngineSettings, watch: Watch) -> int:
        return _serve(end, start, settings, watch, on_end, open_backend)

    return run_watched(sock, on_end, run)


def _serve(
    end: EngineEnd,
    start: Start,
    settings: EngineSettings,
    watch: Watch,
    on_end: Callable[[int], None],
    open_backend: OpenBackend,
) -> int:
    try:
        backend = load(settings.model, open_backend, lambda share: end.send(Loading(share)))
    except BackendError as error:
        end.send(LoadFailed(str(error)))
        return 1
    try:
        end.send(Loaded(model_info(backend)))
        message = end.receive()
        if not isinstance(message, SetMarks):
            return 0
        backend.tokenizer.set_marks(message.marks.texts, message.marks.ends)
        core = EngineCore(backend, settings.limits, adapter_paths=settings.model.adapters)
        core.adapters.set_marks(message.marks.texts, message.marks.ends)
        if start.adapters is not None:
            core.adapters.restore(start.adapters)
        reader = Reader(end, core, settings, watch, on_end)
        threading.Thread(target=reader.run, name="reader", daemon=True).start()
        try:
            info = with_adapter_texts(model_info(backend), core.adapters.special_texts())
            end.send(Ready(info, core.adapters.paths))
            run_loop(core, reader, end, watch.activity())
        except DeviceLost as error:
            log.error("engine ends: %s", error)
            on_end(1)  # At once: libraries that tidy up a lost device may wait for it for ever.
            return 1
        except Exception:
            log.critical("the engine can't go on, and ends", exc_info=True)
            reader.status = 1
            for request_id in core.suspects:  # Each is tried as often as one that had begun, and no more.
                end.send(Progress(request_id, "running"))
        finally:
            reader.close()
        return reader.status
    finally:
        backend.close()


def main() -> None:
    """Entry point of the engine process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the front, which closes the socket when it is done.
    log_to_stderr("info")
    status = serve(socket.socket(fileno=int(sys.argv[1])), on_end=_end)
    sys.exit(status)


def _end(status: int) -> None:
    """End the process once what rests of chats is written.

    The model may be in the middle of a long step, which nobody waits for any more.
    """
    write_rest(REST_S)
    os._exit(status)


if __name__ == "__main__":
    main()
