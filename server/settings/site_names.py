"""How settings write the names that a server answers to, and the origins of web pages."""

import re

ANY = "*"
DEFAULT_PORTS = {"http": ":80", "https": ":443"}

NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
_HOST_PATTERN = re.compile(rf"(?:\*\.)?{NAME}")
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._\[\]:-]*)", re.ASCII)


def parse_host_pattern(text: str) -> str:
    """A name to answer to: `box.example`, `*.example` for all names that end so, or `*`. Raises ValueError."""
    pattern = text.lower().rstrip(".")
    if pattern != ANY and not _HOST_PATTERN.fullmatch(pattern):
        raise ValueError(f"expected a host name such as box.example, *.example or *, not {text!r:.80}")
    return pattern


def parse_origin(text: str) -> str:
    """An origin as browsers write it: no path, small letters, no port that goes without saying. Raises ValueError."""
    origin = text.lower().removesuffix("/") if text.count("/") == 3 else text.lower()
    if origin in (ANY, "null"):
        return origin
    parts = _ORIGIN.fullmatch(origin)
    if parts is None or (parts["scheme"] in DEFAULT_PORTS and not parts["host"]):
        raise ValueError(f"expected an origin such as https://app.example, null or *, not {text!r:.80}")
    return origin.removesuffix(DEFAULT_PORTS.get(parts["scheme"], ""))
