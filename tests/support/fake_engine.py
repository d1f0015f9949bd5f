"""The engine process with a model made of rules: `python fake_engine.py FD`.

Prompts steer it: "crash" in a prompt kills the process when it would write its third token, "hang" makes that step
last for ever, and "lose" loses the device in it; "fault" is a fault of ours while it is placed. While the file named by
`settings.model.model` exists, loading fails.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fakes import FakeBackend, FakeKV, letters

from tightrope.backends.errors import BackendError, DeviceLost
from tightrope.backends.reuse import Reuse
from tightrope.backends.settings import ModelSettings
from tightrope.engine.process.child import serve

TURN = "<|turn|>"  # a token that no flag makes special


def next_token(token_ids: Sequence[int]) -> int:
    text = bytes(i for i in token_ids if i < 256)
    if b"crash" in text and len(text.split(b"crash")[1]) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if b"hang" in text and len(text.split(b"hang")[1]) >= 3:
        signal.pause()
    if b"lose" in text and len(text.split(b"lose")[1]) >= 3:
        raise DeviceLost("cuda:0 is lost after a step of 1 tokens: CUDA error: an illegal memory access")
    return letters(token_ids)


class Faulty(FakeKV):
    """Raises what nobody expects where a prompt says so."""

    def open(self, seq_id: int, token_ids: Sequence[int], namespace: str, **how: object) -> Reuse:
        if b"fault" in bytes(i for i in token_ids if i < 256):
            raise ZeroDivisionError("a fault of ours")
        return super().open(seq_id, token_ids, namespace, **how)


def open_fake(settings: ModelSettings, progress: Callable[[float], None]) -> FakeBackend:
    progress(1.0)
    if settings.model is not None and Path(settings.model).exists():
        raise BackendError(f"{settings.model}: not a model")
    backend = FakeBackend(next_token, max_num_seqs=settings.max_num_seqs, added=[TURN])
    backend.kv = Faulty(backend.kv.capacity)
    return backend


if __name__ == "__main__":
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1])), os._exit, open_fake))
