"""The `tightrope` command: before it imports anything, it takes the current folder off the modules' search path."""

from tightrope.processes import open_closed_streams, search_no_current_folder


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 when it failed, 2 when it can't be understood."""
    search_no_current_folder()
    open_closed_streams()
    from tightrope.server.cli.commands import run  # What this imports must not come from the current folder.

    return run(arguments)
