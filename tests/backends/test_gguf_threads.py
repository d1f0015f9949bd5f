"""Threads of llama.cpp that a step leaves out."""

import threading
from pathlib import Path

from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.backends.sharing import Threads

STEPS = 20


def cpu_ns() -> tuple[int, int]:
    """How long the calling thread has run, and all others of this process together."""
    own, others = threading.get_native_id(), 0
    for task in Path("/proc/self/task").iterdir():
        ran = int((task / "schedstat").read_text().split()[0])
        if int(task.name) == own:
            mine = ran
        else:
            others += ran
    return mine, others


def test_threads_that_a_step_leaves_out_sleep() -> None:
    settings = ModelSettings(threads=2, max_model_len=512, cache=CacheSettings(tokens=512, dtype="f16"))
    backend = GGUFBackend(bundled_model(), settings, lambda share: None)
    backend.kv.open(0, list(range(100, 101 + STEPS + 2)), "")

    def step(start: int) -> None:
        assert backend.kv.reserve(0, 1)
        backend.forward([Chunk(0, [100 + start], start, "last")])
        backend.kv.commit(0, start, [100 + start])

    step(0)  # Both threads run.
    backend._context._threads = Threads(1)  # Beside a busy process it would come to that by itself.
    backend._context.set_threads(1)
    step(1)
    own_before, others_before = cpu_ns()
    for start in range(2, 2 + STEPS):
        step(start)
    own, others = cpu_ns()
    backend.close()
    assert others - others_before < (own - own_before) / 10
