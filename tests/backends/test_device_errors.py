"""What is made of the errors that torch, a driver and Triton raise; a card's are raised by stand-ins."""

import re
import subprocess

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from tightrope.backends.errors import BackendError, DeviceLost, OutOfMemory
from tightrope.backends.hf.run.device_errors import failing_as

pytestmark = pytest.mark.quick

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
MORE = "\nCUDA kernel errors might be asynchronously reported at some other API call\nCompile with `TORCH_USE_CUDA_DSA`"


class Card:
    """A driver whose context keeps an error, as it does after an illegal access; `waits` counts synchronisations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lasting: Exception | None = None
        self.waits = 0
        monkeypatch.setattr(torch.cuda, "synchronize", self._synchronize)

    def _synchronize(self, device: torch.device) -> None:
        assert device == CARD
        self.waits += 1
        if self.lasting is not None:
            raise self.lasting


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def named(error: Exception, device: torch.device = CARD) -> BackendError:
    """What becomes of an error in a step."""
    with pytest.raises(BackendError) as caught, failing_as("a step of 7 tokens", device):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB"),
        torch.AcceleratorError(f"CUDA error: out of memory{MORE}"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
    ids=["torch's allocator", "the driver", "cuBLAS", "Triton's launcher", "Python"],
)
def test_who_finds_no_memory_on_a_card_is_told_by_its_error(card: Card, error: Exception):
    found = named(error)

    assert type(found) is OutOfMemory
    first = str(error).partition("\n")[0] or "MemoryError"
    assert str(found) == f"out of memory in a step of 7 tokens: {first}"
    assert card.waits == 0


def test_memory_that_a_cpu_does_not_have_is_told_by_torchs_own_error():
    with (
        pytest.raises(OutOfMemory, match=r"out of memory in a step: .*can't allocate memory"),
        failing_as("a step", CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_an_error_that_stays_with_the_context_loses_the_device(card: Card):
    card.lasting = torch.AcceleratorError(f"{ILLEGAL}{MORE}")

    found = named(torch.AcceleratorError(f"{ILLEGAL}{MORE}"))

    assert type(found) is DeviceLost
    assert str(found) == f"cuda:0 is lost after a step of 7 tokens: {ILLEGAL}"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(f"CUDA error: invalid configuration argument{MORE}"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        OutOfResources(131072, 101376, "shared memory"),
        PTXASError("PTXAS error: Internal Triton PTX codegen error\n"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_another_error_fails_the_step_alone_where_the_card_goes_on(card: Card, error: Exception):
    found = named(error)

    assert type(found) is BackendError
    assert str(found).startswith("the model failed in a step of 7 tokens: ")
    assert card.waits == 1


def test_on_a_cpu_nothing_is_waited_for(card: Card):
    assert type(named(RuntimeError("shapes don't fit"), CPU)) is BackendError
    assert card.waits == 0


@pytest.mark.parametrize("error", [KeyError("q_proj"), OSError(5, "Input/output error"), ZeroDivisionError()])
def test_what_no_device_raises_stays_what_it_is(error: Exception):
    with pytest.raises(type(error)) as caught, failing_as("a step", CPU):
        raise error
    assert caught.value is error


def test_a_refusal_of_ours_stays_what_it_is(card: Card):
    with pytest.raises(BackendError, match=r"^an invalid token$"), failing_as("a step", CARD):
        raise BackendError("an invalid token")
    assert card.waits == 0


def test_a_small_shared_memory_is_told_with_what_to_do(card: Card):
    """In NCCL's words of a container with docker's 64 MiB."""
    last = "Last error:\nError while creating shared memory segment /dev/shm/nccl-x1 (size 9637888), error: No space"
    error = named(RuntimeError(f"NCCL error in: ../NCCLUtils.cpp:94, unhandled system error\n{last}"))
    assert re.fullmatch(
        r".* failed: NCCL wants tens of MiB in /dev/shm, which has \d+ MiB left: give docker --shm-size 1g", str(error)
    )
