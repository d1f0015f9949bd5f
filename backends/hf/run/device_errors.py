"""What an error of a device means: no memory for this step, a step that failed, or a device that is gone."""

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tightrope.backends.errors import BackendError, DeviceLost, OutOfMemory
from tightrope.kernels import dispatch

# Torch's allocator on a card has an error of its own. Whoever else finds no memory is told by these words alone: the
# driver, cuBLAS, Triton's launcher, and torch's allocator on a CPU.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)

SHARED_MEMORY = "/dev/shm"  # Ranks on cards that don't reach each other meet there.


@contextmanager
def failing_as(work: str, *devices: torch.device) -> Iterator[None]:
    """Raise BackendError where work on devices fails: OutOfMemory, or DeviceLost where one of them is gone with it."""
    try:
        yield
    except tuple({kind for device in devices for kind in errors_of(device)}) as error:
        raise _named(error, work, devices) from error
    finally:
        dispatch.compiling.end()  # A compile that has failed doesn't say so.


def errors_of(device: torch.device) -> tuple[type[Exception], ...]:
    """What work on a device may raise: on a card Triton compiles, too, and its errors are no RuntimeErrors."""
    if device.type != "cuda":
        return RuntimeError, MemoryError
    from triton.errors import TritonError  # triton is there only where CUDA is

    return RuntimeError, MemoryError, OSError, subprocess.SubprocessError, TritonError


def first_line(error: BaseException) -> str:
    """What torch says before it goes on about environment variables; its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _named(error: Exception, work: str, devices: Sequence[torch.device]) -> BackendError:
    if _is_out_of_memory(error):
        return OutOfMemory(f"out of memory in {work}: {first_line(error)}")
    if SHARED_MEMORY in str(error):
        return BackendError(_shared_memory_line(work))
    for device in devices:
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as lasting:  # An error that is still there belongs to the context, and stays with it.
            return DeviceLost(f"{device} is lost after {work}: {first_line(lasting)}")
    return BackendError(f"the model failed in {work}: {first_line(error)}")


def _shared_memory_line(work: str) -> str:
    """NCCL names its file, and in another line than its first."""
    try:
        left = f"has {shutil.disk_usage(SHARED_MEMORY).free >> 20} MiB left"
    except OSError:
        left = "isn't there"
    return f"{work} failed: NCCL wants tens of MiB in {SHARED_MEMORY}, which {left}: give docker --shm-size 1g"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
