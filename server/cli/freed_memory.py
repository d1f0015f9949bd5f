"""What becomes of memory that this process has freed."""

import ctypes

M_MMAP_THRESHOLD = -3  # The number is that of glibc's malloc.h.
LARGE_BYTES = 64 << 10


def give_back_freed_memory() -> None:
    """Let the system have large blocks back as soon as they are freed.

    The C library would take more and more of them from its heap, which bodies of a megabyte leave full of holes: tens
    of megabytes stay for each hundred of them. Another library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
