"""The process that renders chat templates: they come with models from anywhere, so they get a sandbox and limits.

Jinja's sandbox keeps it from Python's insides. What the sandbox can't limit are time and memory: one expression may
build a gigabyte, one loop may never end, and a thread can't be stopped from outside. A process can. Its first argument
is the time of the processor that one job may take, in whole seconds: an end for a loop that nobody waits for any more.

Frames on stdin and stdout hold JSON text, which keeps the order of keys and whole numbers of any size. The process ends
with its stdin.
"""

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tightrope.engine.process.frames import pack, read_frame
from tightrope.processes import limit_cpu

MEMORY_BYTES = 512 << 20  # It bounds the address space, of which an interpreter with Jinja takes about 40 MB.

_LOADING = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_REACHING = (nodes.Getattr, nodes.Getitem, *_LOADING)


@dataclass(frozen=True, slots=True)
class RenderJob:
    """A template's source and the variables of each chat that it writes; without any it is looked through, not run."""

    source: str
    chats: tuple[dict[str, Any], ...]

    def packed(self) -> bytes:
        """As a frame holds it. The variables must be of JSON's own types."""
        return _json([self.source, self.chats])


@dataclass(frozen=True, slots=True)
class Rendered:
    """`text`, or why there is none; is_refusal: the template says so itself, of these messages."""

    text: str | None
    error: str | None
    is_refusal: bool = False


_OUT_OF_MEMORY = Rendered(None, "the chat template was stopped: it used too much memory")


def _json(value: object) -> bytes:
    """UTF-8 that `json.loads` reads back as it was; halves of characters, which templates can make, included."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")


class TemplateRefused(Exception):
    """The template itself called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; for serving it is a block with a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - read by Jinja as a class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: not escaped for HTML, as Jinja's own filter would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template, ready to render. Raises jinja2.TemplateError."""
    return _environment().from_string(source)


def check(source: str) -> None:
    """Raise SecurityError if the template names Python's insides or other files, on whatever way through it.

    One that is broken says so when it renders: a model whose chats can't be written still continues texts.
    """
    try:
        tree = _environment().parse(source)
    except jinja2.TemplateSyntaxError:
        return
    for node in tree.find_all(_REACHING):
        name: object = type(node).__name__.lower()
        if isinstance(node, nodes.Getattr):
            name = node.attr
        elif isinstance(node, nodes.Getitem):
            name = node.arg.value if isinstance(node.arg, nodes.Const) else ""
        if isinstance(node, _LOADING) or (isinstance(name, str) and name.startswith("__")):
            raise SecurityError(f"{name} in line {node.lineno}")


def render(source: str, variables: dict[str, Any] | None) -> Rendered:
    """Render one chat, or look the template through; whatever it does wrong becomes one line of text."""
    try:
        if variables is None:
            check(source)
            return Rendered("", None)
        return Rendered(compiled(source).render(**variables), None)
    except TemplateRefused as exc:
        return Rendered(None, str(exc), is_refusal=True)
    except SecurityError as exc:
        return Rendered(None, f"the chat template reaches for something that is forbidden: {exc}")
    except jinja2.TemplateSyntaxError as exc:
        return Rendered(None, f"the chat template is broken in line {exc.lineno}: {exc.message}")
    except MemoryError:
        return _OUT_OF_MEMORY
    except RecursionError:
        return Rendered(None, "the chat template was stopped: it calls itself without end")
    except Exception as exc:  # A template is a program: it can fail in every way that a program can.
        return Rendered(None, f"the chat template can't render these messages: {exc}")


def serve(read: BinaryIO, write: BinaryIO, cpu_s: int) -> None:
    """Answer jobs until the other side closes."""
    while (job := read_frame(read)) is not None:
        limit_cpu(cpu_s)
        source, chats = json.loads(job)
        made = [render(source, variables) for variables in chats or [None]]
        try:
            answer = pack(_json([asdict(rendered) for rendered in made]))
        except MemoryError:
            answer = pack(_json([asdict(_OUT_OF_MEMORY)] * len(made)))
        write.write(answer)
        write.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
