"""What people read in a terminal. Texts of files, requests and models stand in it, and none of them steers it."""

import logging
import re
import sys

# Controls of both sets, ends of lines, and marks that turn the direction of writing; lone halves of characters.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BUT_LINES = re.compile(f"(?![\n\t]){_STEERING.pattern}")


def printable(text: str) -> str:
    """One line, in which whatever would steer a terminal is written as an escape, such as \\x1b."""
    return _STEERING.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """The same for a text that may have several lines, and tabs in them."""
    return _BUT_LINES.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """A record is one line, whatever its message quotes; a traceback behind it has its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # The name is logging's own.
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def log_to_stderr(level: str) -> None:
    """Send this process' log to stderr, from `level` on: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
