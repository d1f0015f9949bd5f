"""How a command ends that can't do what was asked: one line on standard error, and a status."""


class CommandFailed(Exception):
    """The command can't go on: no such model, port in use. The message is one line."""

    status = 1


class UsageError(CommandFailed):
    """An argument can't be used; the message is one line that names it."""

    status = 2
