"""Finds tool calls in an answer while it is written.

Text and calls come out as early as they are certain, and the same however the text was cut into pieces; a whole answer
is one piece. Text that only looks like a call (of no known function, or of another form) stays text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

from tightrope.server.chats.call_format import NAME_CHARACTER, CallFormat


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A call of a function begins; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(slots=True)
class Call:
    """A call as far as it was written."""

    call_id: str
    name: str
    arguments: str  # It is the text of a JSON object.


Piece = str | CallOpened | Arguments  # A str is text of the answer.

_NAME = f"{NAME_CHARACTER}*"
_HEAD = (r"\s*", r"\{", r"\s*", '"name"', r"\s*", ":", r"\s*", f'"{_NAME}"', r"\s*", ",", r"\s*")
_KEYS = ('"arguments"', '"parameters"')
_AFTER = (r"\s*", ":", r"\s*", r"\{")
_WHOLE = re.compile(rf'{"".join(_HEAD[:7])}"({_NAME})"{"".join(_HEAD[8:])}(?:{"|".join(_KEYS)}){"".join(_AFTER)}')


def _beginnings(atoms: Iterator[str]) -> str:
    """A pattern of everything that may still become what the atoms describe one after another."""
    atom = next(atoms, None)
    return "" if atom is None else f"(?:{atom}{_beginnings(atoms)})?"


def _single(atoms: tuple[str, ...]) -> Iterator[str]:
    """The atoms with literals cut into characters."""
    for atom in atoms:
        if atom == f'"{_NAME}"':
            yield from ('"', _NAME, '"')
        elif atom.startswith('"'):
            yield from atom
        else:
            yield atom


_MAY_BECOME = [re.compile(_beginnings(_single((*_HEAD, key, *_AFTER)))) for key in _KEYS]


class CallParser:
    """Reads one answer. `names` are the functions that may be called."""

    def __init__(self, call_format: CallFormat, names: frozenset[str], *, is_forced: bool = False) -> None:
        """is_forced: the answer is calls, and nothing besides."""
        self._format = call_format
        self._names = names
        self._is_forced = is_forced
        self._is_cut = False
        self._held = ""  # It has been read, and is not certain yet.
        self._read = self._text if call_format.opening else self._head
        self._depth = 0  # It counts the brackets that are open inside the arguments.
        self._in_string = self._is_escaped = False
        self._is_after_call = False
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """What is certain with some more text."""
        self._held += text
        return list(self._pieces(is_end=False))

    def finish(self, *, is_cut: bool = False) -> list[Piece]:
        """The rest, when no more text comes. A call that was cut short stays as far as it came.

        is_cut: the text ends in the middle of something, so that what may have become a call is no text.
        """
        self._is_cut = is_cut
        return list(self._pieces(is_end=True))

    def whole(self, text: str, *, is_cut: bool) -> tuple[str, list[Call]]:
        """The text and the calls of a whole answer."""
        content = ""
        calls: list[Call] = []
        for piece in (*self.feed(text), *self.finish(is_cut=is_cut)):
            match piece:
                case str():
                    content += piece
                case CallOpened(call_id=call_id, name=name):
                    calls.append(Call(call_id, name, ""))
                case Arguments(text=arguments):
                    calls[-1].arguments += arguments
        return content, calls

    def _pieces(self, *, is_end: bool) -> Iterator[Piece]:
        """Run the state that reads now until it wants more text; each says whether it got any further."""
        goes_on = True
        while goes_on:
            made, goes_on = self._read(is_end)
            yield from made

    def _text(self, is_end: bool) -> tuple[list[Piece], bool]:
        """Outside calls."""
        opening = self._format.opening
        before, found, after = self._held.partition(opening)
        if not found:
            num_of_mark = _overlap(self._held, opening)
            is_text = is_end and not (self._is_cut and (self._is_forced or num_of_mark > 1))
            shown = len(self._held) if is_text else len(self._held) - num_of_mark
            shown_text, self._held = self._held[:shown], self._held[shown:]
            return self._shown(shown_text), False
        self._held, self._read = after, self._head
        return self._shown(before), True

    def _shown(self, text: str) -> list[Piece]:
        """White space right after a call is no part of the answer."""
        if self._is_after_call:
            text = text.lstrip()
        self._is_after_call = self._is_after_call and not text
        return [text] if text else []

    def _head(self, is_end: bool) -> tuple[list[Piece], bool]:
        """Inside a call, before its arguments."""
        match = _WHOLE.match(self._held)
        if match is not None and match[1] in self._names:
            self._held, self._read = self._held[match.end() - 1 :], self._arguments
            return [self._opened(match[1])], True
        if match is None and not is_end and any(pattern.fullmatch(self._held) for pattern in _MAY_BECOME):
            return [], False
        self._read = self._unordered
        return [], True

    def _opened(self, name: str) -> CallOpened:
        self.num_calls += 1
        self._is_after_call = True
        return CallOpened(self.num_calls - 1, f"call_{uuid4().hex[:24]}", name)

    def _unordered(self, is_end: bool) -> tuple[list[Piece], bool]:
        """A call in another order or with more in it is read when it is whole; what is none is text."""
        opening, closing = self._format.opening, self._format.closing
        inside, found, after = self._held.partition(closing) if closing else (self._held, "", "")
        if not closing and not is_end and self._held.lstrip()[:1] in ("", "{"):
            return [], False
        if closing and not found and not is_end:
            return [], False
        self._held, self._read = after, self._text if closing else self._plain
        call = self._whole_call(inside)
        if not call and not found and self._is_cut and (opening or self._is_forced):
            return [], False
        return (call or self._shown(opening + inside + found)), bool(after)

    def _whole_call(self, text: str) -> list[Piece]:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return []
        name = call.get("name") if isinstance(call, dict) else None
        if name not in self._names:
            return []
        arguments: object = call.get("arguments", call.get("parameters")) or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [opened := self._opened(name), Arguments(opened.index, text)]

    def _arguments(self, is_end: bool) -> tuple[list[Piece], bool]:
        """Inside the arguments, up to the bracket that closes them."""
        for place, character in enumerate(self._held):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
            if self._depth == 0:
                text, self._held = self._held[: place + 1], self._held[place + 1 :]
                self._read = self._tail
                return [Arguments(self.num_calls - 1, text)], True
        text, self._held = self._held, ""
        return ([Arguments(self.num_calls - 1, text)] if text else []), False

    def _tail(self, is_end: bool) -> tuple[list[Piece], bool]:
        """After the arguments, up to the end of the call."""
        closing = self._format.closing or "}"
        _, found, after = self._held.partition(closing)
        if not found:
            self._held = "" if is_end else self._held
            return [], False
        self._held, self._read = after, self._text if self._format.opening else self._plain
        return [], True

    def _plain(self, is_end: bool) -> tuple[list[Piece], bool]:
        """No more calls come."""
        text, self._held = self._held, ""
        return self._shown(text), False


def _overlap(text: str, opening: str) -> int:
    """How many characters at the end of the text are the beginning of `opening`."""
    return next((n for n in range(min(len(opening) - 1, len(text)), 0, -1) if text.endswith(opening[:n])), 0)
