"""Large pages of memory for the weights that llama.cpp loads.

It asks for memory as any program does, and most systems give that in pages of 4 KiB, unless a program says that it
would rather have large ones. Each step reads all weights: the processor has to find page after page, and at the end has
forgotten where everything else is.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LARGE = 2 << 20  # bytes
LEAST = 4 * LARGE  # Less memory than this, such as a stack, is left as it is.


def want_large_pages() -> None:
    """Have all memory in large pages that this process has asked for and not written to, where much lies together.

    To be called where such memory will be filled. Where the system has no large pages, or none are left, it gets small
    ones.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    for begin, end in _stretches():
        present = np.zeros(((end - begin) // LARGE, LARGE // mmap.PAGESIZE), np.uint8)
        if libc.mincore(begin, end - begin, present.ctypes.data) == 0:
            for first, last in _runs(np.logical_not(present.any(axis=1))):
                if (last - first) * LARGE >= LEAST:
                    libc.madvise(begin + first * LARGE, (last - first) * LARGE, mmap.MADV_HUGEPAGE)


def _stretches() -> Iterator[tuple[int, int]]:
    """Begin and end, at borders of large pages, of what this process alone may write and no file is behind."""
    with open("/proc/self/maps") as file:
        for line in file:
            places, access, _, _, inode, *name = line.split()
            begin, end = (int(place, 16) for place in places.split("-"))
            begin, end = -(-begin // LARGE) * LARGE, end // LARGE * LARGE
            if access == "rw-p" and inode == "0" and not name and end - begin >= LEAST:
                yield begin, end


def _runs(is_empty: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where stretches of true values begin and end."""
    borders = np.flatnonzero(np.diff(is_empty, prepend=False, append=False))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)
