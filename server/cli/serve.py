"""`tightrope serve`: the front process, from the bound socket to the last drained answer."""

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

import uvloop
from prometheus_client.registry import Collector

from tightrope import __version__
from tightrope.backends import heap
from tightrope.backends.embedding.card import EmbedderCard
from tightrope.engine.console import log_to_stderr, printable
from tightrope.engine.embedding.client import EmbeddingClient
from tightrope.engine.errors import BackendFailed, EngineError
from tightrope.engine.process.client import EngineClient
from tightrope.engine.protocol import Engine
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import ModelInfo
from tightrope.server.app import create_app
from tightrope.server.cli.failures import CommandFailed, UsageError
from tightrope.server.http.draining import Drain
from tightrope.server.http.guards import warn_of_everybody
from tightrope.server.http.listening import CantListen, HttpServer, bind, http_server
from tightrope.server.models.catalog import read_catalog
from tightrope.server.models.model import MakeEngine
from tightrope.server.models.models import Models
from tightrope.server.models.room import Room
from tightrope.server.served import means_the_model
from tightrope.server.settings.settings import ServerSettings, SettingsError
from tightrope.server.state import AppState, front_of

log = logging.getLogger("tightrope.serve")

DRAIN_S = 60  # After SIGTERM answers may go on for so long.
LARGE_BYTES = 64 << 10  # Bodies of a megabyte would leave the heap full of holes, tens of MiB for each hundred of them.
SHOWN_NAMES = 10  # So many models are named at the start.


def serve(settings: ServerSettings, notes: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status. Raises CommandFailed if address or model can't be had.

    notes: lines on the settings, to be told with those on the model.
    """
    listener = begin(settings)
    run_front(settings, listener, notes, _engine)
    return 0


def begin(settings: ServerSettings) -> socket.socket:
    """The socket to listen on, once logging is set up. Raises CommandFailed if the address can't be had."""
    _log_to_stderr(settings.log_level)
    heap.map_from(LARGE_BYTES)
    try:
        return bind(settings.host, settings.port)
    except CantListen as error:
        raise CommandFailed(str(error)) from None


def run_front(
    settings: ServerSettings,
    listener: socket.socket,
    notes: Sequence[str],
    make_engine: MakeEngine,
    collect: Callable[[Models], Collector] | None = None,
) -> None:
    """Serve on this socket until SIGTERM or Ctrl-C. Raises CommandFailed if the model can't be had.

    collect: what makes more metrics of the models.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, listener, notes, make_engine, collect))


async def _serve(
    settings: ServerSettings,
    listener: socket.socket,
    notes: Sequence[str],
    make_engine: MakeEngine,
    collect: Callable[[Models], Collector] | None,
) -> None:
    url = base_url(settings.host, listener.getsockname()[1])
    models, more_notes = _models(settings, make_engine)
    embedder = EmbeddingClient(settings.engine, lambda: models.is_writing)
    front, notes = front_of(models, settings, embedder), (*notes, *more_notes)
    if collect is not None:
        front.metrics.add(collect(models))
    drain = Drain(DRAIN_S)
    server = http_server(create_app(front, drain), access_log=settings.log_level == "debug")
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop, drain)
    if models.is_alone:
        say(f"tightrope {__version__} at {url} is loading the model")
    announce = _announce if models.is_alone else _announce_several
    announcing = asyncio.create_task(announce(front, server, drain, url, notes))
    ending = asyncio.create_task(_end(drain, server))
    try:
        await server.serve([listener])
        if announcing.done():
            announcing.result()  # This raises what kept the model from being loaded.
    finally:
        announcing.cancel()
        ending.cancel()


def _models(settings: ServerSettings, make_engine: MakeEngine) -> tuple[Models, Sequence[str]]:
    """What is served, and lines on what is left out. Raises UsageError."""
    if settings.models is None:
        return Models.alone(make_engine(settings.engine, None), settings, make_engine), ()
    try:
        catalog = read_catalog(settings)
    except SettingsError as error:
        raise UsageError(str(error)) from None
    return Models.of(catalog.settings, settings, make_engine, Room()), catalog.notes


def _engine(settings: EngineSettings, adapters: Mapping[str, str] | None = None) -> Engine:
    """One that will be in a process of its own."""
    return EngineClient(settings, adapters=adapters)


def _stop(drain: Drain) -> None:
    """The first signal lets answers finish; the second ends everything at once, the engine with it."""
    if drain.is_on:
        os._exit(1)  # The engine sees its socket close.
    if drain.num_open:
        log.warning("finishing the answers under way, at most %d s; a second signal stops at once", DRAIN_S)
    drain.begin()


async def _end(drain: Drain, server: HttpServer) -> None:
    """End the server once it has been told to, and owes nobody an answer; until then it listens, and refuses."""
    await drain.over()
    server.should_exit = True


async def _announce(front: AppState, server: HttpServer, drain: Drain, url: str, setting_notes: Sequence[str]) -> None:
    """Print what is served once it is. Raises CommandFailed, after ending the server, when it can't be, or no more."""
    engine, settings = front.engine, front.settings
    try:
        await front.embedder.wait_ready()
        info = await engine.wait_ready()
        for name in engine.adapters:
            if means_the_model(name, settings.served_model_name or info.model_id):
                raise BackendFailed(f"--lora: {name!r} means the model itself; give the adapter another name")
        notes = (*setting_notes, *await front.template_notes())
    except EngineError as error:
        server.should_exit = True
        if drain.is_on:
            return
        raise CommandFailed(error.message) from None
    say("\n".join(map(printable, ready_lines(info, settings, url, notes, front.embedder.cards))))
    warn_of_everybody(settings.host, settings.api_key)
    reason = await engine.wait_failed()
    server.should_exit = True
    raise CommandFailed(reason)


async def _announce_several(front: AppState, server: HttpServer, drain: Drain, url: str, notes: Sequence[str]) -> None:
    """Print what there is to be served: a model that can't be is told of to those who ask for it.

    Raises CommandFailed, after ending the server, for an embedding model that can't be.
    """
    try:
        await front.embedder.wait_ready()
    except EngineError as error:
        server.should_exit = True
        if drain.is_on:
            return
        raise CommandFailed(error.message) from None
    say("\n".join(map(printable, several_lines(front.models, front.settings, url, notes, front.embedder.cards))))
    warn_of_everybody(front.settings.host, front.settings.api_key)


def say(text: str) -> None:
    """Print what people may want to read; a full disk or a reader that left is no reason not to serve."""
    try:
        print(text, flush=True)
    except OSError as error:
        log.warning("standard output takes nothing more: %s", error.strerror)
        with open(os.devnull, "w") as nowhere:
            # Otherwise what is left in its buffer fails again at the end.
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def ready_lines(
    info: ModelInfo,
    settings: ServerSettings,
    url: str,
    more_notes: Sequence[str] = (),
    embedders: Sequence[EmbedderCard] = (),
) -> list[str]:
    """What a person wants to know once the model is there, and one line to try."""
    name = settings.served_model_name or info.model_id
    return [
        f"ready     {name} ({info.architecture}, {info.format})",
        *([] if info.fault is None else [f"slow      {info.fault}"]),
        f"context   {info.max_model_len} tokens",
        f"cache     {info.cache_tokens} tokens, {info.cache_dtype}, for up to {info.max_num_seqs} answers at a time",
        *(f"beside    {_of_embedder(card)}" for card in embedders),
        *(f"note      {note}" for note in (*info.notes, *more_notes, *(n for card in embedders for n in card.notes))),
        *_last_lines(settings, url, {}),
    ]


def several_lines(
    models: Models, settings: ServerSettings, url: str, notes: Sequence[str], embedders: Sequence[EmbedderCard] = ()
) -> list[str]:
    """The same of several models, none of which needs to be loaded."""
    names = [model.name for model in models.all]
    more = f", and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    sleep = "" if settings.sleep_idle_s is None else f"; one that idles for {settings.sleep_idle_s:g} s is unloaded"
    return [
        f"models    {len(names)} in {settings.models}, up to {settings.models_max} loaded at a time{sleep}",
        f"names     {', '.join(names[:SHOWN_NAMES])}{more}",
        *(f"beside    {_of_embedder(card)}" for card in embedders),
        *(f"note      {note}" for note in notes),
        *_last_lines(settings, url, {"model": names[0]}),
    ]


def _last_lines(settings: ServerSettings, url: str, named: Mapping[str, str]) -> list[str]:
    key = "" if settings.api_key is None else " -H 'Authorization: Bearer YOUR_KEY'"
    messages = [{"role": "user", "content": "Hello!"}]
    body = shlex.quote(json.dumps({**named, "messages": messages, "max_tokens": 100}))
    return [
        f"url       {url} (API pages at {url}/docs)",
        f"try       curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {body}",
    ]


def _of_embedder(card: EmbedderCard) -> str:
    what = f"vectors of {card.dimensions} numbers" if card.kind == "embedding" else "ranks texts"
    return f"{card.model_id} ({card.architecture}, {card.format}): {what}, texts of up to {card.max_tokens} tokens"


def base_url(host: str, port: int) -> str:
    """The address to type on this machine; a wildcard address means loopback there."""
    if host in ("0.0.0.0", "::", "*"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr(level: str) -> None:
    log_to_stderr(level)
    for name in ("uvicorn.error", "uvicorn", "httpx", "asyncio"):
        # theirs says what ours says already ("Started server process", "Application startup complete")
        logging.getLogger(name).setLevel("DEBUG" if level == "debug" else "WARNING")
