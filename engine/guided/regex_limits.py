"""Repeats inside repeats of a regular expression, which say nothing new or ask for more than a window holds."""

import math
import re
from dataclasses import dataclass

MAX_REPEATS = 100_000  # The innermost part of nested repeats such as ((a{10}){10}){10} may come so many times.


@dataclass(slots=True)
class _Group:
    """A group of a regular expression that is being read."""

    num_branches: int = 1
    num_items: int = 0
    repeats: float = 1.0  # Its innermost part may come so many times.
    last: float = 1.0  # The innermost part of its last item may come so many times.
    last_is_endless: bool = False  # It tells whether the last item is repeated without a limit.


_QUANTIFIER = re.compile(r"(?:[*+?]|\{\s*(\d+)\s*(,?)\s*(\d*)\s*\})\??")
_ATOM = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|\(\?[^:)=!]*[:)=!]?|[^\\]", re.DOTALL)


def repeat_fault(pattern: str) -> str | None:
    """What is wrong with the repeats of a regular expression, if anything is.

    An endless repeat of nothing but an endless repeat, as in (a+)+, has no meaning of its own: the inner one alone says
    the same. Other errors are the library's to find.
    """
    groups = [_Group()]
    place = 0
    while place < len(pattern):
        group = groups[-1]
        quantifier = _QUANTIFIER.match(pattern, place)
        if quantifier is not None and group.num_items:
            text, low, comma, high = quantifier[0], *quantifier.groups()
            most = float(high or (math.inf if comma else low)) if low else (1.0 if text[0] == "?" else math.inf)
            if most == math.inf and group.last_is_endless:
                return f"the repeat {text!r} at character {place + 1} repeats what is an endless repeat already"
            group.last *= most if most < math.inf else 1.0
            if group.last > MAX_REPEATS:
                return f"it repeats a part up to {group.last:.0f} times; {MAX_REPEATS} are the most"
            group.repeats = max(group.repeats, group.last)
            group.last_is_endless = most == math.inf
            place = quantifier.end()
            continue
        atom = _ATOM.match(pattern, place)
        if atom is None:
            return None
        place = atom.end()
        if atom[0] == "[":
            place = _class_end(pattern, place)
        if atom[0] == "|":
            group.num_branches, group.num_items = group.num_branches + 1, 0
        elif atom[0] == ")" and len(groups) > 1:
            groups.pop()
            is_endless = group.num_branches == 1 and group.num_items == 1 and group.last_is_endless
            outer = groups[-1]
            outer.num_items += 1
            outer.last, outer.last_is_endless = group.repeats, is_endless
            outer.repeats = max(outer.repeats, outer.last)
        elif atom[0].startswith("(") and not (atom[0].startswith("(?") and atom[0].endswith(")")):
            groups.append(_Group())
        elif atom[0] not in ("^", "$"):
            group.num_items += 1
            group.last, group.last_is_endless = 1.0, False
    return None


def _class_end(pattern: str, place: int) -> int:
    """The place after a class such as [^]a-z[:digit:]] whose bracket stands before `place`."""
    depth = 1
    if pattern[place : place + 1] == "^":
        place += 1
    if pattern[place : place + 1] == "]":
        place += 1
    while place < len(pattern) and depth:
        character = pattern[place]
        depth += (character == "[") - (character == "]")
        place += 2 if character == "\\" else 1
    return place
