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


class ThreadPool:
    """Threads for one context. In a build of llama.cpp with OpenMP they exist, but OpenMP's do the work."""

    def __init__(self, context: Any, threads: int) -> None:  # noqa: ANN401 - a native pointer
        """Attach `threads` threads, the caller's own among them, to a llama_context."""
        self._library: Any = ll._lib  # Llama_cpp wraps none of these functions.
        self._pointer: ctypes.c_void_p | None = None
        params = _Params()
        self._library.ggml_threadpool_params_init(ctypes.byref(params), ctypes.c_int(threads))
        if params.n_threads != threads:
            log.info("llama.cpp's default threads are used: ggml_threadpool_params has another layout")
            return
        params.poll = POLL
        self._library.ggml_threadpool_new.restype = ctypes.c_void_p
        self._pointer = ctypes.c_void_p(self._library.ggml_threadpool_new(ctypes.byref(params)))
        self._library.llama_attach_threadpool(ctypes.c_void_p(context), self._pointer, self._pointer)

    def close(self) -> None:
        """End the threads. The context must be freed before."""
        if self._pointer is not None:
            self._library.ggml_threadpool_free(self._pointer)
            self._pointer = None
