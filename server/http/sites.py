"""Which names this server answers to, and which web pages may talk to it. Plain ASGI, so that nothing is buffered.

A browser runs the pages of every site that a person opens, beside programs that only this machine can reach. It sends
what a page asks it to, and names the page's site in the header Origin; a request with a foreign one is refused unread.
A page can get around that by pointing its own name at this machine (DNS rebinding): then it is of the same site as this
server. What it can't change is the header Host, which still says that name. An address in it is safe, since a browser
looks up names alone.

Behind a proxy that ends TLS, or gives requests another Host, this server can't know its own address. The browser does,
and says so: "Sec-Fetch-Site: same-origin" (https://www.w3.org/TR/fetch-metadata/), which no page can set. It sends that
only to https and to localhost, so that a name which was pointed elsewhere would need a certificate, or is no localhost.
"""

import logging
import re
import shlex
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tightrope.server.http.errors import AmbiguousHost, ForeignHost, ForeignOrigin
from tightrope.server.http.guards import refuse
from tightrope.server.settings.site_names import ANY, NAME, parse_origin

log = logging.getLogger("tightrope.server")

SAME_ORIGIN = "same-origin"
LONGEST_SHOWN = 200  # A message quotes so many characters of a header at most.
_HOST_HEADER = re.compile(rf"(?:\[(?P<v6>[0-9a-f:.]+(?:%[\w.-]+)?)\]|(?P<name>{NAME})\.?)(?::\d{{1,5}})?", re.ASCII)


class HostGuard:
    """Refuse requests for names that nobody has said are this server's; addresses and localhost always are."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        """names: as `parse_host_pattern` gives them."""
        self._app = app
        self._names = frozenset(names)
        self._has_told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = Headers(scope=scope).getlist("host") if scope["type"] == "http" else []
        if len(hosts) > 1:
            return await refuse(AmbiguousHost("a request has one Host header, not several"), scope, receive, send)
        if not hosts or self._is_ours(hosts[0]):  # Every browser sends the header.
            return await self._app(scope, receive, send)
        shown = hosts[0][:LONGEST_SHOWN]
        parts = _HOST_HEADER.fullmatch(hosts[0].lower())
        hint = "" if parts is None else f"; to answer to it: --allowed-hosts {parts['name'] or parts['v6']}"
        if not self._has_told:
            self._has_told = True
            log.warning("refused a request for another host: host=%r%s", shown, hint)
        error = ForeignHost(f"this server does not answer to the name {shown!r}{hint}")
        return await refuse(error, scope, receive, send)

    def _is_ours(self, header: str) -> bool:
        if ANY in self._names:
            return True
        parts = _HOST_HEADER.fullmatch(header.lower())
        if parts is None:
            return False
        name = parts["v6"] or parts["name"]
        try:
            ip_address(name)
        except ValueError:
            labels = name.split(".")
            suffixes = {"*." + ".".join(labels[start:]) for start in range(1, len(labels))}
            return labels[-1] == "localhost" or name in self._names or not self._names.isdisjoint(suffixes)
        return True


class OriginGuard:
    """Refuse what pages of other sites ask to be done; reading they may ask for, but get no leave to see the answer."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        """origins: as `parse_origin` gives them."""
        self._app = app
        self._origins = tuple(origins)
        self._has_told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if headers.getlist("sec-fetch-site") == [SAME_ORIGIN]:
            return await self._app(scope, receive, send)
        foreign = [origin for origin in headers.getlist("origin") if not self._is_known(origin, scope, headers)]
        if not foreign:
            return await self._app(scope, receive, send)
        hint = self._hint(foreign[0])
        if not self._has_told:
            self._has_told = True
            shown = foreign[0][:LONGEST_SHOWN]
            log.warning("refused a page of another site: origin=%r path=%r%s", shown, scope["path"], hint)
        if scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        error = ForeignOrigin(f"pages of {foreign[0][:LONGEST_SHOWN]!r} may not call this server{hint}")
        return await refuse(error, scope, receive, send)

    def _is_known(self, origin: str, scope: Scope, headers: Headers) -> bool:
        if ANY in self._origins:
            return True
        try:
            parsed = parse_origin(origin)
            own = parse_origin(f"{scope['scheme']}://{headers.get('host', '')}")
        except ValueError:
            return False
        return parsed in self._origins or (parsed == own and "host" in headers)

    def _hint(self, origin: str) -> str:
        try:
            added = parse_origin(origin)
        except ValueError:
            return ""
        return f"; to let them in: --cors-origins {shlex.quote(','.join((*self._origins, added)))}"
