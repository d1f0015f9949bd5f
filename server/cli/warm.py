"""`tightrope warm`: a model's kernels compiled for a card before it is served, and perhaps before it is bought."""

import time
from collections.abc import Iterable

from tqdm import tqdm

from tightrope.backends.errors import BackendError
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import ARCHITECTURES, Warmed
from tightrope.engine.console import printable
from tightrope.server.cli.failures import CommandFailed, UsageError


def parse_architectures(text: str | None) -> list[int]:
    """Numbers of architectures, written sm_86 and with commas between several. Raises UsageError for an unknown one."""
    known = {f"sm_{number}": number for number in ARCHITECTURES}
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--arch: {name[:40]!r} is none of {', '.join(known)}")
    return list(dict.fromkeys(known[name] for name in names))


def warm(settings: ModelSettings, architectures: list[int]) -> int:
    """Compile, and say what was compiled and where it is; return the exit status. Raises CommandFailed."""
    from tightrope.backends import detect  # Its models' libraries take seconds to import.

    began_s = time.monotonic()
    with tqdm(
        total=100, desc="compiling", unit="%", leave=False, disable=None, bar_format="{desc} {bar} {n:.0f} %"
    ) as bar:
        try:
            done = detect.warm(
                settings, architectures, lambda share: bar.update(max(0.0, 100 * share - bar.n)) and None
            )
        except BackendError as error:
            raise CommandFailed(str(error)) from None
    print("\n".join(map(printable, to_lines(done, time.monotonic() - began_s))))
    return 0


def to_lines(done: Iterable[Warmed], seconds: float) -> list[str]:
    """What came of it, as people read it."""
    lines = [
        f"sm_{one.architecture:<6} {one.num_kernels} kernels, {one.num_compiled} of them compiled now" for one in done
    ]
    folders = dict.fromkeys(one.folder for one in done)
    return [*lines, *(f"kept in   {folder}" for folder in folders), f"took      {seconds:.0f} s"]
