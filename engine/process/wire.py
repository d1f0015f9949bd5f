"""Messages between the front and the engine process: frames of msgpack over a socket pair."""

import socket
import threading
from contextlib import suppress
from typing import Literal

import msgspec
from msgspec import Struct

from tightrope.backends.embedding.card import Cut, EmbedderCard
from tightrope.engine.errors import EngineError, rebuild_error
from tightrope.engine.process.frames import pack, read_frame
from tightrope.engine.types import Delta, GenerateRequest, ModelInfo, Prompt, Stats, TokenRun, TurnMarks, Written

MAX_FRAME_BYTES = 256 << 20


class ErrorFrame(Struct, frozen=True):
    """An EngineError on its way across the border."""

    code: str
    message: str
    param: str | None
    details: dict[str, int]

    @classmethod
    def of(cls, error: EngineError) -> "ErrorFrame":
        return cls(error.code, error.message, error.param, error.details())

    def rebuild(self) -> EngineError:
        return rebuild_error(self.code, self.message, self.param, self.details)


class Start(Struct, frozen=True, tag="start"):
    """First frame to the engine: an EngineSettings as JSON.

    `adapters` are the paths, by name, of those that the engine before this one served at last.
    """

    settings: str
    adapters: dict[str, str] | None = None


class SetMarks(Struct, frozen=True, tag="set_marks"):
    """Answer to Loaded: what else is special in chats of this model."""

    marks: TurnMarks


class Submit(Struct, frozen=True, tag="submit"):
    """A request. `written` has for each of its choices what an engine before this one gave out, None for nothing."""

    request: GenerateRequest
    written: tuple[Written | None, ...] = ()


class Cancel(Struct, frozen=True, tag="cancel"):
    request_id: str


class Tokenize(Struct, frozen=True, tag="tokenize"):
    call_id: int
    prompt: Prompt
    adapter: str | None = None  # The tokens are those of this one.
    last: int | None = None  # So many of them are wanted, from the end; None is all.
    is_bare: bool = False  # Their ids alone are wanted.


class Detokenize(Struct, frozen=True, tag="detokenize"):
    call_id: int
    token_ids: tuple[int, ...]
    adapter: str | None = None


class LoadAdapter(Struct, frozen=True, tag="load_adapter"):
    """in_place: an adapter of that name gives way to this one."""

    call_id: int
    name: str
    path: str
    in_place: bool


class UnloadAdapter(Struct, frozen=True, tag="unload_adapter"):
    call_id: int
    name: str


class Embed(Struct, frozen=True, tag="embed"):
    """Vectors of some texts, or their scores against the query. A text may be token ids, which are run as they are.

    model: the number of one that EmbedderReady names. first: the first text's number in its request. dimensions:
    vectors are cut to so many numbers, None for all. norm: they are scaled by this norm then, see `scaled` of
    engine.embedding.texts. is_busy: answers are being written meanwhile.
    """

    call_id: int
    model: int
    texts: tuple[str | tuple[int, ...], ...]
    first: int
    query: str | None = None
    cut: Cut = "no"
    dimensions: int | None = None
    norm: int = 2
    is_busy: bool = False


class TellHeld(Struct, frozen=True, tag="tell_held"):
    """From now on the engine is to tell which tokens it holds, all of them first. Nobody asks within one machine."""


ToEngine = Start | SetMarks | Submit | Cancel | Tokenize | Detokenize | LoadAdapter | UnloadAdapter | Embed | TellHeld


class Loading(Struct, frozen=True, tag="loading"):
    """How much of the model is loaded, from 0 to 1; told now and then."""

    share: float


class Loaded(Struct, frozen=True, tag="loaded"):
    """The model is in memory; the engine waits for SetMarks before it takes requests."""

    info: ModelInfo


class Ready(Struct, frozen=True, tag="ready"):
    """Requests are taken; `adapters` are the paths, by name, of those that requests may use."""

    info: ModelInfo
    adapters: dict[str, str]


class LoadFailed(Struct, frozen=True, tag="load_failed"):
    """The model can't be loaded, and trying again won't help."""

    message: str


class Alive(Struct, frozen=True, tag="alive"):
    """A sign of life, now and then. is_compiling: what runs waits for a kernel, and takes as long as that takes."""

    is_compiling: bool = False


class Progress(Struct, frozen=True, tag="progress"):
    """How far a request is: being made ready for the loop, waiting there for its turn, or in the step that begins."""

    request_id: str
    stage: Literal["preparing", "waiting", "running"]


class StepDone(Struct, frozen=True, tag="step"):
    """All that one step brought, for all requests. stats: None where they were told a moment ago."""

    deltas: tuple[Delta, ...]
    stats: Stats | None = None


class HeldBlocks(Struct, frozen=True, array_like=True):
    """Hashes of blocks one behind another, that came and went since the last time: see News in backends/holdings.py."""

    is_whole: bool
    stride: int
    added: bytes
    removed: bytes


class Held(Struct, frozen=True, tag="held"):
    """What has changed in which tokens can be found, sent before the StepDone of the step that changed it.

    number: one more than that of the one before; a gap means that something was lost. fingerprint, read_share: see
    Holdings. adapters: their fingerprints by name; None: as told before.
    """

    number: int
    cached: HeldBlocks
    stored: HeldBlocks
    fingerprint: bytes
    read_share: float
    adapters: dict[str, str] | None


class Refused(Struct, frozen=True, tag="refused"):
    """A request ended with an error."""

    request_id: str
    error: ErrorFrame


class Tokenized(Struct, frozen=True, tag="tokenized"):
    call_id: int
    tokens: TokenRun


class Detokenized(Struct, frozen=True, tag="detokenized"):
    call_id: int
    text: str


class AdapterList(Struct, frozen=True, tag="adapter_list"):
    """The adapters that requests may use now, as in Ready, and the special tokens of their own vocabularies."""

    call_id: int
    adapters: dict[str, str]
    special_texts: tuple[str, ...] = ()


class EmbedderReady(Struct, frozen=True, tag="embedder_ready"):
    """The embedding models are in memory, and texts are taken."""

    cards: tuple[EmbedderCard, ...]


class Embedded(Struct, frozen=True, tag="embedded"):
    """values: float32, little-endian, a row for each text; of a reranker one logit. num_tokens: of each text."""

    call_id: int
    values: bytes
    num_tokens: tuple[int, ...]


class CallFailed(Struct, frozen=True, tag="call_failed"):
    call_id: int
    error: ErrorFrame


ToFront = (
    Alive
    | Loading
    | Loaded
    | LoadFailed
    | Ready
    | Progress
    | StepDone
    | Held
    | Refused
    | Tokenized
    | Detokenized
    | AdapterList
    | EmbedderReady
    | Embedded
    | CallFailed
)

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode


def encode_frame(message: ToEngine | ToFront) -> bytes:
    """One frame, header included. Raises ValueError for one above MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; the engine takes {MAX_FRAME_BYTES}")
    return pack(body)


class EngineEnd:
    """The engine's end of the socket: blocking, one thread reads, any thread sends."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb")
        self._lock = threading.Lock()

    def receive(self) -> ToEngine | None:
        """The next message, or None when the front is gone."""
        try:
            body = read_frame(self._reader)
        except OSError:
            return None
        return None if body is None else decode_to_engine(body)

    def send(self, message: ToFront) -> None:
        """Write one frame. A front that is gone is not an error here: `receive` tells."""
        frame = encode_frame(message)
        with self._lock:
            try:
                self._sock.sendall(frame)
            except OSError:
                return

    def is_front_gone(self) -> bool:
        """Whether `receive` would return None at once; may be asked while another thread is in it."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # This wakes a thread in `receive`.
        self._reader.close()
        self._sock.close()
