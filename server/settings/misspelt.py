"""What is said of a name that no option has: those that may have been meant."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches

from tightrope.server.settings.options import OPTIONS

MOST_NEAR = 3


def no_such(name: str, write: Callable[[str], str] = str) -> str:
    """The rest of a line on such a name. write: how an option is written where it stood."""
    near = [write(option) for option in _near(name.lower().lstrip("-").replace("_", "-"))]
    if not near:
        return "no such setting"
    *others, last = near
    return f"no such setting; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def _near(name: str) -> Iterator[str]:
    """Options that are called alike, the likeliest first; one that other programs call just so stands alone."""
    meant = {spelling.lstrip("-"): option for option in OPTIONS for spelling in (*OPTIONS[option].aliases, option)}
    found = [name] if name in meant else get_close_matches(name, meant, MOST_NEAR)
    return iter(dict.fromkeys(meant[spelling] for spelling in found))
