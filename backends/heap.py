"""The C library's heap, from which whatever this process computes with is taken.

Memory that is freed stays there, in holes that the next allocation need not fit; but large blocks are mappings of their
own, that go back to the system at once. What is large the library decides by what has been freed before, unless it is
told: then a process has what it uses, and little more. Another library than glibc is left as it is.
"""

import ctypes

M_MMAP_THRESHOLD = -3  # The number is that of glibc's malloc.h.


def map_from(num_bytes: int) -> None:
    """Have blocks of so many bytes and more be mappings of their own."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, num_bytes)


def trim() -> None:
    """Give back all whole pages that are free."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
