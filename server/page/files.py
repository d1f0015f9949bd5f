"""The page's own files, read once, and the policy that they are served under."""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PREFIX = "/page/"  # All files but the page itself lie there.
PAGE = "page.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing inline, nothing from elsewhere, and no text that becomes markup or code, whoever wrote it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # Asked for again each time, and answered with 304 where nothing has changed.
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def reply(self, request: Request, headers: dict[str, str] | None = None) -> Response:
        """The file, or 304 for who has it."""
        told = {**HEADERS, "etag": self.etag, **(headers or {})}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=told)
        return Response(self.content, headers=told, media_type=self.media_type)


@cache
def page_files() -> dict[str, PageFile]:
    """All of them, by their names under PREFIX."""
    folder = Path(__file__).with_name("static")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in _TYPES]
    return {path.relative_to(folder).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(content, _TYPES[path.suffix], f'"{sha256(content).hexdigest()[:32]}"')


def wants_page(request: Request) -> bool:
    """Whether a request for `/` comes from a browser that is to show it: probes and SDKs don't ask for HTML by name."""
    accepted = (part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(","))
    return "text/html" in accepted
