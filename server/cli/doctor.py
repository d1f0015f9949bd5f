"""`tightrope doctor`: what this machine is, and whether all kernels work on it."""

from tightrope.backends.settings import ModelSettings
from tightrope.engine.console import printable
from tightrope.server.cli.failures import CommandFailed


def doctor(settings: ModelSettings) -> int:
    """Print a line for each thing looked at; return the exit status. Raises CommandFailed if something is wrong."""
    from tightrope.backends.doctor import Examination  # Its libraries take seconds to import.

    examination = Examination(settings)
    for about, what in examination.lines():
        print(printable(f"{about:10} {what}"), flush=True)
    if examination.faults:
        more = len(examination.faults) - 1
        raise CommandFailed(examination.faults[0] + (f"; and {more} more, see above" if more else ""))
    return 0
