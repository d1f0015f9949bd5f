"""Kernels compiled before they are needed, on a machine with a card or without one.

What Triton compiles it keeps on disk, by the kernel's source, the types of its arguments, and the card's architecture;
another process finds it there. That takes nothing of a card but the word which one it is.
"""

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tightrope.kernels.triton.jit import Launches


class _StandIn:
    """As much of a driver as compiling asks for. Each architecture is a device of its own number."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)

    def set_current_device(self, device: int) -> None:
        return

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def standing_in(architecture: int) -> Iterator[None]:
    """Meanwhile kernels are compiled for cards of that architecture, such as 86; they can't be launched."""
    before = driver._active
    driver.set_active(_StandIn(architecture))
    try:
        yield
    finally:
        driver._active = before


def compile_all(launches: Launches, num_threads: int, progress: Callable[[float], None]) -> int:
    """Compile what was gathered, or read it from the disk; returns how many were not there.

    Raises RuntimeError, with the kernel's name, for one that can't be compiled.
    """
    were_there: list[bool] = []

    def note(*, cache_hit: bool, **compiled: object) -> None:
        were_there.append(cache_hit)

    device = driver.active.get_current_device()
    hooks = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_cache_hook = knobs.runtime.jit_post_compile_hook = None  # They know of one thread.
    before, knobs.compilation.listener = knobs.compilation.listener, note
    pool = ThreadPoolExecutor(num_threads, initializer=driver.active.set_current_device, initargs=(device,))
    try:
        names = {pool.submit(kernel.preload, data): kernel.__name__ for data, kernel in launches.items()}
        for num_done, future in enumerate(as_completed(names), 1):
            if (error := future.exception()) is not None:
                if (unkept := why_not_kept(error)) is not None:
                    raise RuntimeError(f"compiled kernels can't be kept: {unkept}") from error
                reason = " ".join(str(error).split())[-200:]  # The kernel's source stands before it.
                raise RuntimeError(f"kernel {names[future]} can't be compiled: {reason}") from error
            progress(num_done / len(names))
    finally:
        pool.shutdown(cancel_futures=True)
        knobs.compilation.listener = before
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = hooks
    return were_there.count(False)


def cache_folder() -> str:
    """Where Triton keeps what it compiles."""
    return str(knobs.cache.dir)


def why_not_kept(error: BaseException) -> str | None:
    """Whether an error is that the disk takes nothing of what is compiled, and what would help."""
    folder = cache_folder()
    if not folder:
        return "TRITON_CACHE_DIR is empty; set it to a folder that can be written"
    if not isinstance(error, OSError):
        return None
    is_about_it = str(error.filename or "").startswith(folder) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = (error.strerror or str(error)).lower()
    return f"{words} in {folder}; set TRITON_CACHE_DIR to a folder that can be written" if is_about_it else None
