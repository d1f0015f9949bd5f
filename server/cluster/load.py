"""How many replicas the work at hand is worth: what Ray scales by, since it sees none of our requests."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

POLICY = f"{__name__}:wanted_replicas"  # Deployments name it so.
BYTES_PER_TOKEN = 4  # English has about so many.
FULL_TOKENS = 8192  # A replica with so many tokens of prompts before it keeps newcomers waiting, whatever else it does.


def load_of(num_open: int, num_places: int, unread_bytes: int) -> float:
    """The load of one replica: 1 is a full one, by answers for each of which it has a place, or by prompts to read."""
    return max(num_open / num_places, unread_bytes / BYTES_PER_TOKEN / FULL_TOKENS)


def wanted_replicas(context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
    """Ray's autoscaling policy: as many replicas as the loads of all make full ones, within the bounds set."""
    loads = (context.aggregated_metrics or {}).get("load", {})
    wanted = math.ceil(sum(loads.values())) if loads else context.target_num_replicas
    bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(max(wanted, bounds[0]), bounds[1]), {}
