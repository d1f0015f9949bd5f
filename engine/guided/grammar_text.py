"""Grammars as clients write them, GBNF or Lark, and what is looked for before one of them is compiled.

llguidance finds errors of syntax and names that are missing. Here are found rules that begin with themselves, as
llama.cpp refuses them too; grammars that no text satisfies, which would otherwise run to the end of the window;
repeats inside repeats, which say nothing new or ask for more than a window holds; and what is too long or too deep for
a parser that recurses.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llguidance.gbnf_to_lark import gbnf_to_lark

from tightrope.engine.guided.regex_limits import MAX_REPEATS, repeat_fault

MAX_BYTES = 64 << 10  # Alternatives cost the more the more there are: 5,000 compile in 0.1 s.
MAX_RULES = 500  # Rules call each other as deep.
MAX_DEPTH = 30  # It is of parentheses.
MAX_CIRCLE = 8  # A message names so many rules of a circle at most.

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+|//[^\n]*|\#[^\n]*|\\\n)
    |(?P<newline>\n)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    |(?P<special><[^<>\n]+>)
    |(?P<directive>%\w+[^\n]*)
    |(?P<count>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)
    |(?P<name>[?!]?[A-Za-z_][\w-]*(?:\.-?\d+)?)
    |(?P<other>->|\.\.|.)""",
    re.VERBOSE,
)
_HARMLESS = ("%ignore", "%import")


@dataclass(slots=True)
class Item:
    """A part of a sequence: the name of a rule, a group, or a terminal (both None), at least once or perhaps not."""

    name: str | None = None
    group: "list[list[Item]] | None" = None
    is_optional: bool = False
    most: float = 1  # It may stand here so many times.


Branches = list[list[Item]]  # Each alternative is a sequence.


@dataclass(slots=True)
class _Open:
    """A group or rule that is being read."""

    closing: str
    branches: Branches = field(default_factory=lambda: [[]])


def lark_of(text: str) -> str:
    """Lark for a grammar in GBNF (rules with ::=, from `root`) or in Lark (rules with a colon, from `start`).

    Raises ValueError with what is wrong with it.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    lark = text
    if "::=" in text:
        try:
            lark = gbnf_to_lark(text)
        except RecursionError:
            raise ValueError("its brackets are nested too deep") from None
        except Exception as error:  # The library raises plain Exception for all that can be wrong with a text.
            raise ValueError(str(error) or type(error).__name__) from None
        lark = lark.removeprefix("%llguidance {}")
    rules = read_rules(lark)
    _check_rules(rules)
    return lark


def without_special(lark: str) -> str:
    """The same with a text in place of every special token, for a vocabulary that has none."""
    return "".join('"s"' if token.lastgroup == "special" else token[0] for token in _TOKEN.finditer(lark))


def read_rules(lark: str) -> dict[str, Branches]:
    """The rules by their names. Raises ValueError for what a request's grammar may not hold, and unclosed brackets."""
    rules: dict[str, Branches] = {}
    stack: list[_Open] = []
    tokens = [(m.lastgroup or "", m[0]) for m in _TOKEN.finditer(lark) if m.lastgroup != "blank"]
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        place += 1
        if kind == "directive":
            if not text.startswith(_HARMLESS):
                raise ValueError(f"{text.split()[0]:.40} is not allowed in a request's grammar")
        elif kind == "name" and (body := _definition(tokens, place)) is not None:
            if len(stack) > 1:
                raise ValueError(f"a bracket is not closed before rule {text!r:.60}")
            rule = _Open("")
            rules[text.lstrip("?!").split(".")[0]] = rule.branches
            if len(rules) > MAX_RULES:
                raise ValueError(f"it has more than {MAX_RULES} rules")
            stack, place = [rule], body
        elif stack:
            place = _take(kind, text, tokens, place, stack)
    if len(stack) > 1:
        raise ValueError("a bracket is not closed")
    return rules


def _definition(tokens: Sequence[tuple[str, str]], place: int) -> int | None:
    """Where the body of a rule begins whose name stands before `place`; None where the name only calls a rule."""
    if tokens[place : place + 1] == [("other", "[")]:  # Attributes may follow, as in name[capture]:.
        while place < len(tokens) and tokens[place][1] not in ("]", "\n"):
            place += 1
        place += 1
    return place + 1 if tokens[place : place + 1] == [("other", ":")] else None


def _take(kind: str, text: str, tokens: Sequence[tuple[str, str]], place: int, stack: list[_Open]) -> int:
    """Add a token to the rule that is open; return the place of the next."""
    branches = stack[-1].branches
    if kind == "name":
        branches[-1].append(Item(name=text.split(".")[0]))
    elif kind == "regex":
        fault = repeat_fault(text[1 : text.rindex("/")])
        if fault is not None:
            raise ValueError(fault)
        branches[-1].append(Item())
    elif kind == "text":
        branches[-1].append(Item(is_optional=text.startswith('""')))
    elif kind == "special":
        branches[-1].append(Item())
    elif kind == "count" and branches[-1]:
        least, most = _counts(text)
        _repeat(branches[-1][-1], least, most)
    elif text == "|":
        branches.append([])
    elif text in ("(", "["):
        if len(stack) > MAX_DEPTH:
            raise ValueError(f"its brackets are nested more than {MAX_DEPTH} deep")
        stack.append(_Open(")" if text == "(" else "]"))
    elif text == stack[-1].closing and len(stack) > 1:
        stack.pop()
        stack[-1].branches[-1].append(Item(group=branches, is_optional=text == "]"))
    elif text in ("*", "+", "?") and branches[-1]:
        _repeat(branches[-1][-1], 0 if text != "+" else 1, 1 if text == "?" else math.inf)
    elif text == "->":
        place += 1  # The name of an alternative follows.
    elif text == ".." and branches[-1]:
        place += 1  # "a".."z" is one terminal.
    return place


def _counts(text: str) -> tuple[int, float]:
    """Least and most of {m}, {m,}, {,n}, {m,n}, ~m and ~m..n."""
    numbers = re.findall(r"\d+", text)
    if "," not in text and ".." not in text:
        return (int(numbers[0]), int(numbers[0])) if numbers else (1, 1)
    least = re.match(r"[{~]\s*(\d+)", text)
    most = re.search(r"(\d+)\s*\}?$", text.partition("," if "," in text else "..")[2])
    return int(least[1]) if least else 0, int(most[1]) if most else math.inf


def _repeat(item: Item, least: int, most: float) -> None:
    item.is_optional = item.is_optional or least == 0
    item.most *= most


# ---- what is looked for ----


def _check_rules(rules: dict[str, Branches]) -> None:
    for name, branches in rules.items():
        repeats = _most_repeats(branches)
        if repeats > MAX_REPEATS:
            raise ValueError(f"rule {name!r:.60} repeats a part up to {repeats:.0f} times; {MAX_REPEATS} are the most")
    barren = sorted(rules.keys() - _productive(rules))
    if barren:
        raise ValueError(f"rule {barren[0]!r:.60} never comes to an end: each of its alternatives calls it again")
    circle = _left_circle(rules)
    if circle:
        names = " -> ".join(circle[:MAX_CIRCLE])
        raise ValueError(f"left recursion: {names:.200}; let a rule begin with something else than itself")


def _most_repeats(branches: Branches) -> float:
    """How often the innermost part may stand in these alternatives; without a limit counts as once."""
    most = 1.0
    for item in _items(branches):
        inside = _most_repeats(item.group) if item.group is not None else 1.0
        most = max(most, inside * (item.most if item.most < math.inf else 1.0))
    return most


def _items(branches: Branches) -> Iterator[Item]:
    for branch in branches:
        yield from branch


def _productive(rules: dict[str, Branches]) -> set[str]:
    """Rules that some finite text satisfies. Names without a rule are terminals that were imported."""
    ending: set[str] = set()

    def ends(branches: Branches) -> bool:
        return any(all(item.is_optional or item_ends(item) for item in branch) for branch in branches)

    def item_ends(item: Item) -> bool:
        if item.group is not None:
            return ends(item.group)
        return item.name is None or item.name not in rules or item.name in ending

    while True:
        more = {name for name in rules.keys() - ending if ends(rules[name])}
        if not more:
            return ending
        ending |= more


def _left_circle(rules: dict[str, Branches]) -> list[str]:
    """Rules of which each can begin with the next, and the last with the first; none where there is no such circle."""
    empty: set[str] = set()

    def may_be_empty(item: Item) -> bool:
        if item.group is not None:
            return item.is_optional or any(all(map(may_be_empty, branch)) for branch in item.group)
        return item.is_optional or item.name in empty

    while more := {
        name for name in rules.keys() - empty if any(all(map(may_be_empty, branch)) for branch in rules[name])
    }:
        empty |= more

    def starts(branches: Branches) -> Iterator[str]:
        for branch in branches:
            for item in branch:
                if item.group is not None:
                    yield from starts(item.group)
                elif item.name in rules:
                    yield item.name
                if not may_be_empty(item):
                    break

    begins = {name: list(dict.fromkeys(starts(branches))) for name, branches in rules.items()}
    done: set[str] = set()
    for first in rules:
        path: list[str] = []
        todo = [iter([first])]
        while todo:
            name = next(todo[-1], None)
            if name is None:
                todo.pop()
                if path:
                    done.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name not in done:
                path.append(name)
                todo.append(iter(begins[name]))
    return []
