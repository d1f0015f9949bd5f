"""What can go wrong below the engine."""


class BackendError(Exception):
    """A model can't be loaded or run.

    The message is one line for the person at the terminal: what was wrong, in which file or field, and what would be
    right.
    """
