"""Who used the processors while something was measured: the server, this client, or others who spoil the numbers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all its children; those that end meanwhile are left out."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _machine_busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


@contextmanager
def measured_cores(pid: int | None) -> Iterator[dict[str, float]]:
    """Yield a dict that holds, after the block, the cores in use on average over it.

    `server_cores` (the tree of `pid`, where given), `client_cores` (this process), and `other_cores` (all the rest of
    the machine, a busy neighbour of our own included).
    """
    cores: dict[str, float] = {}
    tree = process_tree(pid) if pid is not None else []
    before = time.perf_counter(), _machine_busy_s(), _cpu_s(tree), time.process_time()
    yield cores
    after = time.perf_counter(), _machine_busy_s(), _cpu_s(tree), time.process_time()
    wall_s, machine_s, server_s, client_s = (late - early for early, late in zip(before, after, strict=True))
    cores["client_cores"] = client_s / wall_s
    if pid is not None:
        cores["server_cores"] = server_s / wall_s
        cores["other_cores"] = max(0.0, machine_s - server_s - client_s) / wall_s
