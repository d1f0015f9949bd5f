"""Which replicas run, from Ray Serve: the one file that leans on its request router, as ray 2.60 has it.

Ray's controller tells every router of a deployment which replicas may be asked, each with what it has said of itself
when it began; one that is to end is taken off before it is told to. That is all that is taken from Ray here: requests
don't go through its handles, which cost an actor call each and an object for every token, but over sockets, to a
replica that the pool chooses by what it knows and Ray does not.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tightrope.server.cluster.link import Place

ROUTER = f"{__name__}:PlacesRouter"  # Deployments name it so.

Changed = Callable[[Sequence[Place]], None]

_watches: "list[RayWatch]" = []  # Ray makes the router itself, in the process that holds a handle.
_latest: list[Place] = []  # What it told last, for a watch that begins later: it tells of changes alone.


class PlacesRouter(RequestRouter):
    """Tells this process which replicas there are.

    Ray sends the class along with all that its methods name in this module, so they name nothing that can't be sent.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Any: only Ray's own questions come this way."""
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        from tightrope.server.cluster.ray_router import tell

        tell(replicas)


def tell(replicas: Sequence[RunningReplica]) -> None:
    """These run, and no others."""
    _latest[:] = [place_of(replica) for replica in replicas if replica.replica_metadata]
    for watch in list(_watches):
        watch.tell(list(_latest))


def place_of(replica: RunningReplica) -> Place:
    """Where it listens, as it has said itself."""
    said = replica.replica_metadata
    return Place(replica.replica_id.unique_id, said["host"], said["port"], bytes.fromhex(said["secret"]))


class RayWatch:
    """The `Watch` of one deployment's replicas. A process has those of one deployment alone."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._changed: Changed | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, changed: Changed) -> None:
        self._changed, self._loop = changed, asyncio.get_running_loop()
        _watches.append(self)
        self.tell(list(_latest))
        self._handle.options()  # This makes the router, which hears of the replicas from then on.

    def tell(self, places: Sequence[Place]) -> None:
        """To be called from Ray's thread."""
        if self._loop is not None and self._changed is not None:
            self._loop.call_soon_threadsafe(self._changed, places)

    async def settle(self) -> int:
        """One: whoever deploys on a cluster hears of the others from Ray."""
        return 1

    def close(self) -> None:
        _watches.remove(self)
        self._changed = None
