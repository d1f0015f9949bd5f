"""Both ends of a connection prove that they know the replica's secret, without sending it, and without any clock.

The secret travels through Ray alone, to those that may use the replica. What follows is not encrypted, as nothing
between the processes of a Ray cluster is unless its network does that.
"""

import asyncio
import hmac
import secrets
from asyncio import StreamReader, StreamWriter
from typing import TypeVar

from msgspec import MsgspecError

from tightrope.engine.process.frames import FrameTooLong, receive_frame
from tightrope.server.cluster.messages import MAX_GREETING_BYTES, Challenge, Greeting, Hello, Proved, encode
from tightrope.server.cluster.messages import decode_greeting as decode

T = TypeVar("T", bound=Greeting)

NONCE_BYTES = 32
KEY_BYTES = 32
HANDSHAKE_S = 10.0


class NotProved(ConnectionError):
    """The other side doesn't know the secret, or is no such program at all."""


async def greet_replica(reader: StreamReader, writer: StreamWriter, secret: bytes, digest_key: bytes) -> None:
    """The ingress's side. Raises NotProved, and ConnectionError or TimeoutError where nobody answers."""
    async with asyncio.timeout(HANDSHAKE_S):
        challenge = await _receive(reader, Challenge)
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(encode(Hello(_proof(secret, b"ingress", challenge.nonce, nonce), nonce, digest_key)))
        proved = await _receive(reader, Proved)
    if not hmac.compare_digest(proved.proof, _proof(secret, b"replica", challenge.nonce, nonce)):
        raise NotProved("it is no replica of this cluster")


async def greet_ingress(reader: StreamReader, writer: StreamWriter, secret: bytes) -> bytes:
    """The replica's side; returns the key of digests. Raises as `greet_replica` does."""
    async with asyncio.timeout(HANDSHAKE_S):
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(encode(Challenge(nonce)))
        hello = await _receive(reader, Hello)
    if len(hello.nonce) != NONCE_BYTES or len(hello.digest_key) != KEY_BYTES:
        raise NotProved("a nonce or a key of another length")
    if not hmac.compare_digest(hello.proof, _proof(secret, b"ingress", nonce, hello.nonce)):
        raise NotProved("it is no ingress of this cluster")
    writer.write(encode(Proved(_proof(secret, b"replica", nonce, hello.nonce))))
    return hello.digest_key


async def _receive(reader: StreamReader, kind: type[T]) -> T:
    try:
        message = decode(await receive_frame(reader, MAX_GREETING_BYTES))
    except (FrameTooLong, MsgspecError, asyncio.IncompleteReadError) as error:
        raise NotProved(f"it speaks otherwise: {error}") from None
    if not isinstance(message, kind):
        raise NotProved(f"a {type(message).__name__} out of place")
    return message


def _proof(secret: bytes, side: bytes, replica_nonce: bytes, ingress_nonce: bytes) -> bytes:
    """Of fixed lengths, so that no two sets of parts make the same text. side: so that none can be sent back."""
    return hmac.digest(secret, side + replica_nonce + ingress_nonce, "sha256")
