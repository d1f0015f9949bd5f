"""How ranks meet: through shared memory between processes of one CPU, through torch.distributed elsewhere."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tightrope.backends.hf.modules.gather import Gather
from tightrope.backends.hf.run.device_errors import failing_as
from tightrope.backends.tensor_parallel import Share
from tightrope.backends.threads import usable_cpus
from tightrope.kernels import dispatch
from tightrope.kernels.forms.ranks import SharedRanks, shared_bytes
from tightrope.processes import set_variables

Way = Literal["shared", "gloo", "nccl"]
# Ranks of one machine have no business on its network.
LOCAL = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
SPINS, FEW_SPINS = 5000, 50  # Some 100 microseconds, as long as an operation of another rank; with too few CPUs one.
# Longer than a step may take: who watches steps ends an engine that stands still long before.
PATIENCE = timedelta(days=1)


def way_on(device: torch.device) -> Way:
    """How ranks on such devices meet."""
    if device.type == "cuda":
        return "nccl"
    return "shared" if dispatch.can_gather() else "gloo"


def new_memory(count: int) -> int:
    """A descriptor of memory that ranks share, which has no name and goes with the last of them."""
    descriptor = os.memfd_create("tightrope-ranks")
    os.ftruncate(descriptor, shared_bytes(count))
    return descriptor


def open_gather(way: Way, share: Share, num_threads: int, memory: int, store: str, device: torch.device) -> Gather:
    """This rank's gather. memory: what new_memory gave; store: the path of a file by which a group finds itself.

    Returns, for a group, once all ranks have come.
    """
    if way == "shared":
        return SharedGather(share, memory, num_threads)
    return GroupGather(share, way, store, device)


class SharedGather:
    """Through the memory of a machine, by a kernel; see kernels/cpu/meet.h."""

    def __init__(self, share: Share, memory: int, num_threads: int) -> None:
        """memory: what new_memory gave. num_threads: each rank's."""
        mapped = torch.from_file(
            f"/proc/self/fd/{memory}", shared=True, size=shared_bytes(share.count), dtype=torch.uint8
        )
        is_crowded = share.count * num_threads > len(usable_cpus())
        self.share = share
        self.shared: SharedRanks | None = SharedRanks(
            mapped, share.rank, share.count, FEW_SPINS if is_crowded else SPINS
        )

    def __call__(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """See Gather."""
        assert self.shared is not None
        return dispatch.gather(local, sizes, self.shared)

    def close(self) -> None:
        """See Gather: the memory goes with its last user."""

    def leave_step(self) -> None:
        """See dispatch, and so below."""
        assert self.shared is not None
        dispatch.leave_step(self.shared)

    @property
    def has_any_left(self) -> bool:
        assert self.shared is not None
        return dispatch.has_any_left(self.shared)

    @property
    def num_meetings(self) -> int:
        assert self.shared is not None
        return dispatch.num_meetings(self.shared)

    def meet_again(self, num_meetings: int) -> None:
        assert self.shared is not None
        dispatch.meet_again(self.shared, num_meetings)


class GroupGather:
    """By a group of torch.distributed: NCCL between cards, gloo between CPUs. Nobody can leave who waits in it."""

    shared: SharedRanks | None = None

    def __init__(self, share: Share, way: Way, store: str, device: torch.device) -> None:
        """See open_gather. Raises BackendError."""
        set_variables(LOCAL)
        self.share, self._way = share, way
        card = device if device.type == "cuda" else None
        with failing_as("meeting the other ranks", device):
            dist.init_process_group(
                way, f"file://{store}", PATIENCE, world_size=share.count, rank=share.rank, device_id=card
            )

    def __call__(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """See Gather. Ranks send as many columns as the one with the most, in one piece, as a recorded step must."""
        widest, rows = max(sizes), len(local)
        if not rows or not widest:
            return local.new_empty(rows, sum(sizes))
        sent = local.contiguous()
        if local.shape[1] < widest:
            sent = torch.nn.functional.pad(sent, (0, widest - local.shape[1]))
        received = [torch.empty_like(sent) for _ in range(self.share.count)]
        dist.all_gather(received, sent)
        return torch.cat([part[:, :size] for part, size in zip(received, sizes, strict=True)], 1)

    def close(self) -> None:
        """See Gather. NCCL would wait for the others; its group ends with the process."""
        if self._way == "gloo":
            dist.destroy_process_group()
