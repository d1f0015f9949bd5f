"""The application for `serve run` and `serve deploy`, and its parts for `tightrope cluster`."""

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from tightrope.engine.process.launch import Launcher, spawn_process
from tightrope.server.cluster.arguments import settings_of
from tightrope.server.cluster.front import Front
from tightrope.server.cluster.load import POLICY
from tightrope.server.cluster.ray_router import ROUTER
from tightrope.server.cluster.replica import DRAIN_S, END_S, Replica
from tightrope.server.settings.settings import ServerSettings

MAX_TRIES = 3  # While none has run yet so many may fail to start; where others run, it is tried again and again.
HEALTH_S = 5.0  # Ray asks so often how a replica is; of one that dies it hears at once.
HEAD = {"node:__internal_head__": 0.001}  # Ray's name of the node that began the cluster.


def build(arguments: Mapping[str, Any]) -> Application:
    """What a configuration file's `import_path` names: all replicas and their front, by options of ours.

    arguments: options as a configuration file of ours has them, such as {"model": "...", "replicas": 4}. Raises
    SettingsError.
    """
    settings = settings_of(arguments)
    front = serve.deployment(
        name="Front",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=DRAIN_S + END_S,
        max_constructor_retry_count=MAX_TRIES,
    )(Front)
    return front.bind(settings.model_dump_json(), replica_application(settings))


def replica_application(
    settings: ServerSettings,
    memory_bytes: int | None = None,
    launch: Launcher = spawn_process,
    max_tries: int = MAX_TRIES,
) -> Application:
    """The replicas alone; keys stay with the front.

    memory_bytes: of each; None: what is free on its machine. max_tries: see MAX_TRIES.
    """
    cluster = settings.cluster
    most = cluster.max_replicas
    scaling: dict[str, Any] = {"num_replicas": cluster.replicas}
    if most is not None and most > cluster.replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                max_replicas=most,
                initial_replicas=cluster.replicas,
                upscale_delay_s=cluster.scale_up_s,
                downscale_delay_s=cluster.scale_down_s,
                policy=AutoscalingPolicy(policy_function=POLICY),
            )
        }
    replica = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": settings.engine.model.threads or 1, "num_gpus": gpus_of(settings)},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]  # Its keywords are of all types.
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=DRAIN_S + END_S,
        max_constructor_retry_count=max_tries,
        **scaling,
    )(Replica)
    return replica.bind(settings.model_dump_json(exclude={"api_key", "admin_key"}), memory_bytes, launch)


def gpus_of(settings: ServerSettings) -> float:
    """So many GPUs a replica asks Ray for: where nobody says, one for each rank, if there are any."""
    model = settings.engine.model
    if settings.cluster.replica_gpus is not None:
        return settings.cluster.replica_gpus
    has_any = model.device != "cpu" and "GPU" in ray.cluster_resources()
    return float(max(1, model.tensor_parallel)) if has_any else 0.0
