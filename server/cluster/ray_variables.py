"""How Ray is told to keep to itself, which it reads from the environment while it is imported."""

import secrets

from tightrope.processes import set_variables

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # So Ray keeps to the loopback address, whatever the system.
    "RAY_enable_worker_prestart": "0",  # There are no tasks for such workers.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # A replica of no GPU of its own may share one.
    "RAY_AUTH_MODE": "token",
}
TOKEN_BYTES = 32


def keep_ray_at_home() -> None:
    """To be called before Ray is imported, where it is to run on this machine alone.

    Its processes know each other by a token, which without this would lie in the home folder.
    """
    set_variables({**VARIABLES, "RAY_AUTH_TOKEN": secrets.token_hex(TOKEN_BYTES)})
