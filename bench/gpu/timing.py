"""How long work takes on the device, and how fast its memory and its processors are."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call, the work on the device included; the first calls, which compile, don't count."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        return statistics.median(_by_clock(work) for _ in range(repeats))
    times: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _by_clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def memory_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second that a copy of `num_bytes` reads and writes, both counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device, 20)


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph, so that launches cost next to nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def processor_cycles(device: torch.device) -> float:
    """Cycles a second of all multiprocessors together, at the highest clock."""
    from triton.runtime import driver  # it has a driver only where there is a card

    found = driver.active.utils.get_device_properties(device.index or 0)
    return float(found["multiprocessor_count"] * found["sm_clock_rate"] * 1e3)
