"""What an ingress and a replica say to each other: the engine's own messages, behind a handshake."""

import msgspec
from msgspec import Struct

from tightrope.engine.process.frames import pack
from tightrope.engine.process.wire import (
    MAX_FRAME_BYTES,
    AdapterList,
    Alive,
    CallFailed,
    Cancel,
    Detokenize,
    Detokenized,
    LoadAdapter,
    Progress,
    Ready,
    Refused,
    StepDone,
    Submit,
    TellHeld,
    Tokenize,
    Tokenized,
    UnloadAdapter,
)
from tightrope.server.cluster.digests import Digest

MAX_GREETING_BYTES = 1 << 10  # Who has not proved yet to know the secret may send no more.


class Challenge(Struct, frozen=True, tag="challenge"):
    """First from the replica: what the ingress is to sign."""

    nonce: bytes


class Hello(Struct, frozen=True, tag="hello"):
    """The ingress's proof, and what the replica is to sign. digest_key: what is told of tokens is hashed with this."""

    proof: bytes
    nonce: bytes
    digest_key: bytes


class Proved(Struct, frozen=True, tag="proved"):
    """The replica's proof."""

    proof: bytes


class Draining(Struct, frozen=True, tag="draining"):
    """The replica will end: nothing new is to be asked of it, and what it writes may go on for `most_s` seconds."""

    most_s: float


ToReplica = Submit | Cancel | Tokenize | Detokenize | LoadAdapter | UnloadAdapter | TellHeld
EngineWords = Progress | StepDone | Refused | Tokenized | Detokenized | AdapterList | CallFailed
FromReplica = Alive | Ready | Draining | Digest | EngineWords
Greeting = Challenge | Hello | Proved

_encoder = msgspec.msgpack.Encoder()
decode_greeting = msgspec.msgpack.Decoder(Greeting).decode
decode_to_replica = msgspec.msgpack.Decoder(ToReplica).decode
decode_from_replica = msgspec.msgpack.Decoder(FromReplica).decode


def encode(message: Greeting | ToReplica | FromReplica) -> bytes:
    """One frame, header included. Raises ValueError for one above MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; a replica takes {MAX_FRAME_BYTES}")
    return pack(body)
