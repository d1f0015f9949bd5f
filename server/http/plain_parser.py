"""A parser of HTTP that passes over offers of another protocol, as RFC 9110, 7.8 lets a server do.

httptools stops behind the head of a request with the headers Upgrade and Connection, and leaves its body to whoever
speaks the other protocol. Every stock Java client offers h2c that way. Such a head is read once more without the offer.
"""

from typing import Protocol

import httptools

_OF_THE_OFFER = frozenset({b"upgrade", b"http2-settings"})


class Reader(Protocol):
    """Who is called back: with the head of the request that is being read."""

    url: bytes
    headers: list[tuple[bytes, bytes]]


class PlainParser:
    """Reads requests one after another. A reader passes over the ends of a head and of a message with an offer."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._parser = self._new()

    def feed_data(self, data: bytes) -> None:
        """Call the reader back. Raises httptools.HttpParserError for what is no request for us."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                if self._parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserInvalidMethodError("this server is no proxy") from None
                data = self._head() + data[offer.args[0] :]
                self._parser = self._new()

    def should_upgrade(self) -> bool:
        return bool(self._parser.should_upgrade())

    def should_keep_alive(self) -> bool:
        return bool(self._parser.should_keep_alive())

    def get_method(self) -> bytes:
        return bytes(self._parser.get_method())

    def get_http_version(self) -> str:
        return str(self._parser.get_http_version())

    def _new(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self._reader)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # uvicorn's own parser is so.
        return parser

    def _head(self) -> bytes:
        """The head that was just read, without the offer."""
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._reader.url, version)]
        for name, value in self._reader.headers:
            if name == b"connection":
                value = b", ".join(t.strip() for t in value.split(b",") if t.strip().lower() not in _OF_THE_OFFER)
            if value and name not in _OF_THE_OFFER:
                lines.append(b"%b: %b\r\n" % (name, value))
        return b"".join((*lines, b"\r\n"))
