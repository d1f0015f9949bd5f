"""Ray on this machine alone, for as long as this process runs, and one model's replicas in it.

To be imported behind `keep_ray_at_home`.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from tightrope.backends.memory import free_memory
from tightrope.backends.threads import compute_threads
from tightrope.engine.process.launch import Launcher, spawn_process
from tightrope.server.cluster.application import gpus_of, replica_application
from tightrope.server.cluster.fitting import most_replicas
from tightrope.server.cluster.ray_router import Changed, RayWatch
from tightrope.server.settings.settings import ServerSettings

Handle = DeploymentHandle[Any]

log = logging.getLogger("tightrope.cluster")

NAME = "tightrope"
STORE_BYTES = 80 << 20  # Ray's shared memory, which nothing of ours goes through; it takes no less than 75 MiB.
POLL_S = 0.5
QUOTED = "Error:\n"  # Behind it Ray quotes, of a replica that has failed, how the exception's traceback ends,
FAILED = "LoadFailed: "  # and behind this stands our own line.


class LocalCluster:
    """Its replicas are deployed once, whatever asks for them first."""

    def __init__(self, settings: ServerSettings, say: Callable[[str], None], launch: Launcher = spawn_process) -> None:
        """Begin Ray; takes some seconds. say: is told of each replica that is ready. Raises RayFailed."""
        self._most = most_replicas(settings.cluster)
        threads = settings.engine.model.threads or max(1, compute_threads(0) // self._most)
        self._settings = with_threads(settings, threads)
        self._say = say
        self._launch = launch
        self._share: int | None = None  # Of the memory, for each; those that come later have as much.
        self._restarts: set[asyncio.Task[Handle]] = set()
        self._deployed: asyncio.Task[Handle] | None = None
        start_ray(self._most * threads + 1)
        check_gpus(self._most, gpus_of(settings))

    def close(self) -> None:
        """End all replicas, which write what rests of chats, and Ray.

        Who ends a service may end all its processes at once, as systemd does: then Ray is gone, and its own ways to end
        would look for it for a minute.
        """
        if not _answers(ray.get_runtime_context().gcs_address):
            log.warning("Ray has ended before this process, and the replicas with it")
            os._exit(0 if sys.exc_info()[0] is None else 1)  # Its threads crash a process that ends in another way.
        serve.delete(NAME)
        ray.shutdown()  # Serve's own end would tell of calls that it has cut off.

    async def deploy(self) -> Handle:
        """Have Ray begin the replicas, if that was not asked for; returns before they are ready."""
        if self._deployed is None:
            self._deployed = asyncio.create_task(asyncio.to_thread(self._deploy))
        return await asyncio.shield(self._deployed)

    def _deploy(self) -> Handle:
        if self._share is None:  # By now Ray has taken what it needs, and embedding models are in place.
            self._share = free_memory(self._settings.engine.model.keep_free_mib) // self._most
        each_once = self._settings.cluster.replicas
        replicas = replica_application(self._settings, self._share, self._launch, max_tries=each_once)
        target = serve.RunTarget(replicas, NAME, None)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        return handle

    def restart(self) -> None:
        """Put a new replica in the place of each, one after the other, as Ray does with a new version of them."""
        log.warning("all replicas are started anew, one after the other")
        self._restarts.add(task := asyncio.create_task(asyncio.to_thread(self._deploy)))
        task.add_done_callback(self._restarts.discard)

    async def settle(self) -> int:
        """Wait until all replicas are ready, or some are and others can't be; returns how many are.

        Raises RuntimeError in one line where none can be.
        """
        began_s, told = time.monotonic(), 0
        while True:
            number, failure, is_over = await asyncio.to_thread(self._status)
            if number > told:
                told = number
                self._say(f"replica   {number} of {self._settings.cluster.replicas} is ready")
            if number >= self._settings.cluster.replicas:
                return number
            if failure is not None and (number or is_over):
                if not number:
                    raise RuntimeError(failure)
                log.error("a replica can't be started, the others serve: reason=%s", failure)
                return number
            await asyncio.sleep(POLL_S if time.monotonic() - began_s < 60 else 4 * POLL_S)

    @staticmethod
    def _status() -> tuple[int, str | None, bool]:
        """How many replicas are ready, what was said of one that can't be, and whether no other will be tried."""
        application = serve.status().applications.get(NAME)
        if application is None:
            return 0, None, False
        number, failure = 0, None
        for deployment in application.deployments.values():
            number += sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
            if QUOTED in deployment.message:  # It may as well say that some take their time.
                failure = deployment.message.strip().splitlines()[-1].rpartition(FAILED)[2]
        is_over = application.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if is_over and failure is None:
            failure = application.message or "Ray can't start the replicas"
        return number, failure, is_over


def _answers(address: str) -> bool:
    """Whether anybody listens at a HOST:PORT of this machine."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def with_threads(settings: ServerSettings, number: int) -> ServerSettings:
    """The same, with so many threads for each engine."""
    model = settings.engine.model.model_copy(update={"threads": number})
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"model": model})})


class RayFailed(Exception):
    """Ray can't be started on this machine; the message is one line."""


def start_ray(num_cpus: int) -> None:
    """Ray and Serve, as small as they can be. Raises RayFailed.

    num_cpus: as many as the replicas ask for; Ray holds nobody to them.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of a /dev/shm that is smaller than its store, as docker's is, and takes a file in place of that.
    logging.getLogger("ray._private.services").setLevel(logging.ERROR)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            namespace=NAME,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    except Exception as error:  # Ray raises that class itself where it waits in vain for its own processes.
        ray.shutdown()
        raise RayFailed(f"Ray can't be started on this machine: {error}") from error


def check_gpus(replicas: int, each: float) -> None:
    """Raise RayFailed, with Ray ended, where replicas want more GPUs than it finds: it would wait for them for ever."""
    found = ray.cluster_resources().get("GPU", 0.0)
    if round(replicas * each, 4) > found:
        ray.shutdown()
        raise RayFailed(
            f"{replicas} replicas with {each:g} GPUs each are more than the {found:g} that Ray finds on this machine: "
            "ask for fewer --replicas, or have several of them share one by --replica-gpus"
        )


class LocalWatch:
    """The `Watch` of its replicas."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._inner: RayWatch | None = None
        self._begin: asyncio.Task[None] | None = None

    def start(self, changed: Changed) -> None:
        async def begin() -> None:
            self._inner = RayWatch(await self._cluster.deploy())
            self._inner.start(changed)

        self._begin = asyncio.create_task(begin())
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._cluster.restart)

    async def settle(self) -> int:
        assert self._begin is not None
        await self._begin
        return await self._cluster.settle()

    def close(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        if self._begin is not None:
            self._begin.cancel()
        if self._inner is not None:
            self._inner.close()
