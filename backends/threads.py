"""How many threads to compute with."""

import os
from pathlib import Path


def compute_threads(asked: int) -> int:
    """`asked` threads, or with 0 one per physical core that this process may use."""
    return asked or min(physical_cores(), cpu_quota())


def most_threads() -> int:
    """The most that may be asked for: more only wait for each other, and thousands take a machine down."""
    return 4 * len(usable_cpus())


def usable_cpus() -> set[int]:
    """The CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores among the CPUs that this process may run on; counts CPUs where the topology can't be read."""
    cores = set()
    for cpu in usable_cpus():
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def cpu_quota() -> int:
    """CPUs' worth of time that the control group grants, rounded down but at least 1; a large number when unlimited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period)) if quota != "max" else 1 << 16
    except (OSError, ValueError):
        return 1 << 16
