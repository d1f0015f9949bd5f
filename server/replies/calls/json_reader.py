"""Reading JSON while it is written, and calls that are objects of a name and arguments."""

import json
import re
from collections.abc import Callable

from tightrope.server.replies.calls.form import CallReader
from tightrope.server.replies.events import Event
from tightrope.server.replies.reader import Steps

_BRACKET = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
NAME_KEYS, ARGUMENT_KEYS = ("name", "tool_name"), ("arguments", "parameters")
_NAME_KEYS, _ARGUMENT_KEYS = ([f'"{key}"' for key in keys] for keys in (NAME_KEYS, ARGUMENT_KEYS))


class Brackets:
    """Finds the end of a JSON object or list, piece by piece."""

    def __init__(self, depth: int = 0) -> None:
        """depth: so many brackets are open already."""
        self._depth = depth
        self._in_string = self._is_escaped = False

    def end_in(self, text: str) -> int | None:
        """Behind which character of the next piece it ends; None where it goes on."""
        if not text:
            return None
        place = 1 if self._is_escaped else 0
        while (match := _BRACKET.search(text, place)) is not None:
            place = match.end()
            mark = match[0]
            if mark == '"':
                self._in_string = not self._in_string
            elif mark[0] != "\\" and not self._in_string:
                self._depth += 1 if mark in "{[" else -1
                if self._depth <= 0:
                    return place
        self._is_escaped = text.endswith("\\", place)
        return None


class JsonReader(CallReader):
    """What readers of JSON have in common."""

    def give_object(self, made: Callable[[str], Event | None], depth: int = 0) -> Steps[bool]:
        """Give out an object or list that begins here, or goes on here with so many brackets open, up to its end.

        False where the text ended before.
        """
        brackets = Brackets(depth)
        while True:
            end = brackets.end_in(self.held)
            text, self.held = (self.held, "") if end is None else (self.held[:end], self.held[end:])
            if text and (event := made(text)) is not None:
                yield event
            if end is not None or self.is_end:
                return end is not None
            yield None

    def take_object(self, depth: int = 0) -> Steps[str]:
        """The text of an object as far as it comes."""
        pieces: list[str] = []
        yield from self.give_object(pieces.append, depth)
        return "".join(pieces)

    def call_of_object(self) -> Steps[str | None]:
        """Read an object that is a call; if it is none, return what was read of it: all, or as far as it came."""
        read = yield from self._head()
        if read is None:
            return None
        text, depth = read
        text += (yield from self.take_object(depth)) if depth else ""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return text
        call = call.get("function", call) if isinstance(call, dict) else call
        call = call if isinstance(call, dict) else {}
        name = next((call[key] for key in NAME_KEYS if key in call), None)
        if not isinstance(name, str) or name not in self.functions:
            return text
        given: object = next((call[key] for key in ARGUMENT_KEYS if key in call), None) or {}
        yield from self.whole(name, given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
        return None

    def _head(self) -> Steps[tuple[str, int] | None]:
        """An object in the usual order, whose arguments are given out while they come: None.

        Else what was read of another one, and how many of its brackets are open.
        """
        read = yield from self.take_if("{")
        if read is None:
            return "", 0
        name = ""
        names = {json.dumps(name, ensure_ascii=False): name for name in self.functions}
        for atoms in (_NAME_KEYS, (":",), names, (",",), _ARGUMENT_KEYS, (":",)):
            read += yield from self.take_blanks()
            found = yield from self.take_if(*atoms)
            if found is None:
                return read, 1
            read += found
            name = names.get(found, name)
        read += yield from self.take_blanks()
        if not self.held.startswith("{"):
            return read, 1
        yield self.begin(name)
        yield from self.give_object(self.argue)
        yield self.end()
        yield from self.take_object(1)  # What else the object has, such as an id.
        return None
