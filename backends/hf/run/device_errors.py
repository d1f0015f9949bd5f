"""What an error of a device means: no memory for this step, a step that failed, or a device that is gone."""

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
    for device in devices:
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as lasting:  # An error that is still there belongs to the context, and stays with it.
            return DeviceLost(f"{device} is lost after {work}: {first_line(lasting)}")
    return BackendError(f"the model failed in {work}: {first_line(error)}")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
