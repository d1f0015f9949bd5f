"""`tightrope cluster`: several replicas of one model on this machine, which Ray runs and watches."""

import asyncio
import importlib.util
import secrets
from collections.abc import Mapping, Sequence

from tightrope.engine.console import printable
from tightrope.engine.protocol import Engine
from tightrope.engine.settings import EngineSettings
from tightrope.server.cli.failures import CommandFailed, UsageError
from tightrope.server.cli.serve import begin, run_front, say
from tightrope.server.cluster.arguments import check_serves_one_model
from tightrope.server.cluster.fitting import NotHeld, check_fits
from tightrope.server.cluster.ray_variables import keep_ray_at_home
from tightrope.server.settings.settings import ServerSettings, SettingsError

EXTRA = "tightrope cluster needs Ray Serve: pip install 'tightrope[cluster]'"


def cluster(settings: ServerSettings, notes: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status. Raises CommandFailed if address or model can't be had.

    notes: lines on the settings, to be told with those on the model.
    """
    try:
        check_serves_one_model(settings)
    except SettingsError as error:
        raise UsageError(str(error)) from None
    if importlib.util.find_spec("ray") is None:
        raise CommandFailed(EXTRA)
    listener = begin(settings)
    try:
        asyncio.run(check_fits(settings))
    except NotHeld as error:
        raise CommandFailed(str(error)) from None
    keep_ray_at_home()
    try:  # Ray takes seconds to import, and may be there without Serve.
        from tightrope.server.cluster.handshake import KEY_BYTES
        from tightrope.server.cluster.local import LocalCluster, LocalWatch, RayFailed
        from tightrope.server.cluster.metrics import PoolMetrics
        from tightrope.server.cluster.pool import Pool
    except ImportError as error:
        raise CommandFailed(f"{EXTRA} ({printable(str(error))})") from None
    say("Ray is starting on this machine")
    try:
        replicas = LocalCluster(settings, say)
    except RayFailed as error:
        raise CommandFailed(str(error)) from None

    def make_engine(engine: EngineSettings, adapters: Mapping[str, str] | None = None) -> Engine:
        return Pool(engine, LocalWatch(replicas), secrets.token_bytes(KEY_BYTES))

    try:
        run_front(settings, listener, notes, make_engine, PoolMetrics)
    finally:
        replicas.close()
    return 0
