"""One end of the socket between the first rank and another: numbered messages, each with bytes that may follow it."""

import socket
import struct
import threading
from typing import TypeVar

import msgspec

from tightrope.backends.hf.ranks.messages import Answer, Command

_HEAD = struct.Struct("<QQQ")  # The number of the call, the bytes of the message, those of the payload.
Message = TypeVar("Message")
Payload = bytes | bytearray | memoryview


class Link:
    """Messages of several threads go out one at a time; one thread reads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, call: int, message: Command | Answer, payload: Payload = b"") -> None:
        """Raises OSError where the other end has gone."""
        body = self._encoder.encode(message)
        with self._sending:
            self._sock.sendall(_HEAD.pack(call, len(body), len(payload)) + body)
            if payload:
                self._sock.sendall(payload)

    def receive(self, decoder: msgspec.msgpack.Decoder[Message]) -> tuple[int, Message, bytearray]:
        """The next message. Raises OSError where the other end has gone."""
        call, size, payload_size = _HEAD.unpack(self._exactly(_HEAD.size))
        body = self._exactly(size)
        return call, decoder.decode(body), self._exactly(payload_size)

    def close(self) -> None:
        """Wake up whoever reads, at either end."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # It is closed already.
        finally:
            self._sock.close()

    def _exactly(self, size: int) -> bytearray:
        whole = bytearray(size)
        view = memoryview(whole)
        while view:
            count = self._sock.recv_into(view)
            if not count:
                raise ConnectionResetError("the other rank has closed its end")
            view = view[count:]
        return whole
