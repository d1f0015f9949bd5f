"""How much memory there is, and what is done with it where nobody says."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tightrope.backends.errors import DoesNotFit
from tightrope.backends.settings import ModelSettings

GIB, MIB = 1 << 30, 1 << 20
MEMORY_SHARE = 0.9  # The rest of the machine's free memory is left to everyone else.
# Of a card as much stays free: for code of libraries and kernels that is loaded when it first runs, for the workspaces
# of cuBLAS (two of 8 MiB, on Hopper of 32), and for what lies between tensors of changing sizes.
CARD_RESERVE = 320 << 20
PROMPT_LOGITS = 1 << 24  # A step's prompts whose every row is wanted take 64 MiB of float32.
RANK_BYTES = 320 << 20  # Python and libraries take so much in the process of a rank, the first one's apart.
MIN_DEFAULT_TOKENS = 32768  # Several shorter chats have room in the cache side by side with a window's worth of one.


@dataclass(frozen=True, slots=True)
class CardMemory:
    """A card's memory in bytes, as its driver tells it."""

    free_bytes: int
    total_bytes: int

    def usable_bytes(self, fraction: float) -> int:
        """What weights, cache, workspace and graphs may take together, where a process may have `fraction` of all."""
        return max(0, min(self.free_bytes, int(fraction * self.total_bytes)) - CARD_RESERVE)


def default_tokens(window: int, max_num_seqs: int) -> int:
    """Cache capacity in tokens for a window, as long as memory allows."""
    return min(window * max_num_seqs, max(window, MIN_DEFAULT_TOKENS))


def prompt_rows(vocab_size: int, step_tokens: int) -> int:
    """Rows of logits that a step of `step_tokens` may yield for prompts, beside one row for each sequence."""
    return min(step_tokens, max(1, PROMPT_LOGITS // vocab_size))


def spare_bytes(weight_bytes: int, free_bytes: int) -> int:
    """What is left of `free_bytes` for cache and workspace beside the weights; negative when these don't fit."""
    return int(free_bytes * MEMORY_SHARE) - weight_bytes


def does_not_fit(
    tokens: int, kind: str, need_bytes: float, room: int, taken_bytes: int, smaller: Sequence[str], fitting: int
) -> DoesNotFit:
    """The refusal of a cache of `tokens` stored as `kind`, of `need_bytes`, where `room` bytes are left.

    `taken_bytes` are what weights and workspace take, more than there is where `room` is negative. `smaller` are types
    that would hold as many tokens, `fitting` is what this one would hold.
    """
    if room < 0 and not fitting and not smaller:
        taken, free = taken_bytes / GIB, (taken_bytes + room) / GIB
        needs = f"weights and workspace take {taken:.2f} GiB, and {free:.2f} GiB is free"
        return DoesNotFit(f"{needs}: take a smaller model, or free some memory")
    need = f"a cache of {tokens} tokens as {kind} needs {need_bytes / GIB:.2f} GiB beside the weights"
    left = f"{max(0, room) / GIB:.2f} GiB is free"
    other = f"take {' or '.join(f'--kv-cache {name}' for name in smaller)}, or " if smaller else ""
    if fitting == 0:
        return DoesNotFit(f"{need}, and {left}: {other}take a smaller model, or free some memory")
    return DoesNotFit(f"{need}, and {left}: {other}ask for at most {fitting} tokens")


def free_memory(kept_mib: int = 0) -> int:
    """Bytes that this process may still take: what the machine has free, or its control group grants, if less.

    kept_mib: of these so many are for others, in MiB.
    """
    free = _meminfo_available()
    group = Path("/sys/fs/cgroup")
    for folder, limit, used, idle in (
        (group, "max", "current", "inactive_file"),  # This is version 2.
        (group / "memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),  # This is version 1.
    ):
        try:
            granted = int((folder / f"memory.{limit}").read_text())
            taken = int((folder / f"memory.{used}").read_text()) - _stat(folder / "memory.stat", idle)
            free = min(free, granted - taken)
        except (OSError, ValueError):
            continue  # There is no such control group, or no limit in it ("max").
    return max(0, free - (kept_mib << 20))


def free_for(settings: ModelSettings) -> int:
    """The same for one engine, which takes MEMORY_SHARE of it."""
    return at_most(settings, free_memory(settings.keep_free_mib))


def at_most(settings: ModelSettings, free_bytes: int) -> int:
    """So much of `free_bytes` that MEMORY_SHARE of it is no more than the engine may take."""
    most_mib = settings.max_memory_mib
    return free_bytes if most_mib is None else min(free_bytes, grossed_up(most_mib << 20))


def usable_memory(settings: ModelSettings) -> int:
    """What it takes of it in bytes."""
    return int(free_for(settings) * MEMORY_SHARE)


def grossed_up(memory_bytes: int) -> int:
    """Free memory of which the share that `serve` takes is `memory_bytes`: a size that is given may be used up."""
    return math.ceil(memory_bytes / MEMORY_SHARE)


def private_memory(pid: int) -> int:
    """Bytes that a process has to itself; files that it has mapped are none. 0 where that can't be known."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    except (OSError, ValueError):
        return 0  # It has ended, or this is not Linux.


def tree_memory(pid: int) -> int:
    """The same of a process and of all that it has started, as an engine its ranks."""
    return private_memory(pid) + sum(map(tree_memory, _children(pid)))


def _children(pid: int) -> list[int]:
    """Processes that threads of this one have started; none where the system doesn't tell."""
    found: list[int] = []
    with suppress(OSError):  # It has ended.
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):  # The thread has ended.
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def num_ended_for_memory() -> int:
    """How many processes the system has ended for want of memory since it began; 0 where that can't be known."""
    try:
        return _stat(Path("/proc/vmstat"), "oom_kill")
    except OSError:
        return 0  # This is not Linux.


def _stat(path: Path, name: str) -> int:
    """A number of a file with a line for each, such as that of cached files, which the kernel gives back when asked."""
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name), 0)


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62  # Not on Linux, nothing is known, so nothing is refused.
