"""How much memory there is, and what is done with it where nobody says."""

from pathlib import Path

GIB = 1 << 30
MEMORY_SHARE = 0.9  # of the free memory; the rest is left to everyone else
MIN_DEFAULT_TOKENS = 32768  # of the cache: several shorter chats side by side with a window's worth of one


def default_tokens(window: int, max_num_seqs: int) -> int:
    """Cache capacity in tokens for a window, as long as memory allows."""
    return min(window * max_num_seqs, max(window, MIN_DEFAULT_TOKENS))


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or its control group grants, if less."""
    free = _meminfo_available()
    group = Path("/sys/fs/cgroup")
    for folder, limit, used, idle in (
        (group, "max", "current", "inactive_file"),  # version 2
        (group / "memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        try:
            granted = int((folder / f"memory.{limit}").read_text())
            taken = int((folder / f"memory.{used}").read_text()) - _stat(folder / "memory.stat", idle)
            free = min(free, granted - taken)
        except (OSError, ValueError):
            continue  # no such control group, or no limit in it ("max")
    return max(0, free)


def _stat(path: Path, name: str) -> int:
    """A number of memory.stat; `name` counts cached files, which the kernel gives back when memory is asked for."""
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name), 0)


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62  # not Linux: nothing is known, so nothing is refused
