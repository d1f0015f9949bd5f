"""llama.cpp's own threads, with a wait policy that shares a machine.

OpenMP's threads spin at every barrier and between steps. On two cores beside one busy process a decode step then took
up to 52 ms instead of 8, and threads that sleep at barriers halve the speed of a quiet machine. ggml's own pool spins
at the barriers inside a step, which are microseconds apart. Between steps it spins for the time in which the next token
is drawn, as a thread that sleeps is a while in waking, and then sleeps: as fast as spinning on a quiet machine, and
16 ms beside a neighbour, which is the half of the machine that is left.
"""

import ctypes
import logging
from typing import Any

from llama_cpp import llama_cpp as ll

log = logging.getLogger("tightrope.gguf")

_MAX_THREADS = 512  # It is ggml's GGML_MAX_N_THREADS.
POLL = 1  # Of 100, it is how long a thread spins for the next step before it sleeps: some 6 ms.


class _Params(ctypes.Structure):
    """ggml_threadpool_params of ggml.h."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class ThreadPools:
    """The threads of one context. In a build of llama.cpp with OpenMP they exist, but OpenMP's do the work.

    Each number of threads has a pool of its own, made when it is first asked for: threads of a pool that a step leaves
    out would wake for it, and spin in time that the others are short of. ggml has those of the pool before sleep.
    """

    def __init__(self, context: Any, threads: int) -> None:  # noqa: ANN401 - a native pointer
        """Attach `threads` threads, the caller's own among them, to a llama_context."""
        self._library: Any = ll._lib  # Llama_cpp wraps none of these functions.
        self._context = ctypes.c_void_p(context)
        self._pools: dict[int, ctypes.c_void_p] = {}
        self.use(threads)

    def use(self, threads: int) -> None:
        """Have the next steps run on so many."""
        if threads not in self._pools:
            params = _Params()
            self._library.ggml_threadpool_params_init(ctypes.byref(params), ctypes.c_int(threads))
            if params.n_threads != threads:
                log.info("llama.cpp's default threads are used: ggml_threadpool_params has another layout")
                return
            params.poll = POLL
            self._library.ggml_threadpool_new.restype = ctypes.c_void_p
            self._pools[threads] = ctypes.c_void_p(self._library.ggml_threadpool_new(ctypes.byref(params)))
        self._library.llama_attach_threadpool(self._context, self._pools[threads], self._pools[threads])

    def close(self) -> None:
        """End the threads. The context must be freed before."""
        for pool in self._pools.values():
            self._library.ggml_threadpool_free(pool)
        self._pools.clear()
