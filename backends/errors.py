"""What can go wrong below the engine."""


class BackendError(Exception):
    """A model can't be loaded or run.

    The message is one line for the person at the terminal: what was wrong, in which file or field, and what would be
    right.
    """


class DoesNotFit(BackendError):
    """The memory doesn't hold what is asked for; the message says what it would hold."""


class OutOfMemory(BackendError):
    """A step needs more memory than there is. Nothing of it is stored, and a smaller one may run."""


class DeviceLost(BackendError):
    """The device does nothing more for this process; another may use it."""
