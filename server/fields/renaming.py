"""Refusals under the names that a dialect's own fields have, where what is shared knows them by others."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tightrope.engine.errors import InvalidRequest

Names = Mapping[str, str]  # By a regular expression for the beginning of a shared name, what stands in its place.


def rename(error: InvalidRequest, names: Names) -> None:
    """Tell an error of the dialect's own field: in `param`, and where the message begins with it."""
    for pattern, name in names.items():
        if error.param is not None and re.match(pattern, error.param):
            old, error.param = error.param, re.sub(pattern, name, error.param, count=1)
            if error.message.startswith(old):
                error.message = error.param + error.message.removeprefix(old)
            return


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Renames what is refused inside."""
    try:
        yield
    except InvalidRequest as error:
        rename(error, names)
        raise
