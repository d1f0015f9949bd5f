"""The adapters beside a GGUF model's weights. llama.cpp applies one of them, at one scale, to a whole step."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tightrope.backends.adapters import AdapterRoom, fingerprint
from tightrope.backends.files.gguf.header import Header
from tightrope.backends.files.peft import read_adapter
from tightrope.backends.gguf.adapter_file import read_adapter_file
from tightrope.backends.gguf.native import NativeAdapter, NativeContext, NativeModel
from tightrope.backends.gguf.peft_file import Conversion, path_of
from tightrope.backends.gguf.values import check_values
from tightrope.backends.protocol import Chunk, Tokenizer
from tightrope.backends.settings import ModelSettings


def room_for_adapters(settings: ModelSettings, base: Header) -> int:
    """Bytes of the adapters that are loaded at the start, and of the room for more. Raises BackendError."""
    paths = [Path(path).expanduser() for path in settings.adapters.values()]
    return sum(_num_bytes(path, base) for path in paths) + settings.adapter_reserve_bytes


def _num_bytes(path: Path, base: Header) -> int:
    if path.is_dir():
        return Conversion(read_adapter(path), base).num_bytes
    return read_adapter_file(path, base).weight_bytes


class GGUFAdapters:
    """The adapters of one model and context; an AdapterStore."""

    def __init__(self, model: NativeModel, context: NativeContext, base: Header, room: AdapterRoom) -> None:
        self._model, self._context, self._base, self._room = model, context, base, room
        self._in_place: dict[str, tuple[NativeAdapter, str]] = {}  # Their fingerprints stand beside them.
        self._applied: str | None = None

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        """See AdapterStore. llama.cpp reads the file between steps: it has a list that a step may be reading."""
        if path.is_dir():
            return self._prepare_folder(name, path)
        header, mark = read_adapter_file(path, self._base), fingerprint(path)
        with self._room.taken(name, header.weight_bytes):
            check_values(header)  # This brings the file into memory as well.
        return partial(self._put_in_place, name, path, mark)

    def _prepare_folder(self, name: str, folder: Path) -> Callable[[], None]:
        conversion, mark = Conversion(read_adapter(folder), self._base), fingerprint(folder)
        with self._room.taken(name, conversion.num_bytes):
            file = conversion.write()

        def put_in_place() -> None:
            with file:
                self._put_in_place(name, path_of(file), mark)

        return put_in_place

    def _put_in_place(self, name: str, path: Path, mark: str) -> None:
        self._in_place[name] = NativeAdapter(self._model, path), mark

    def tokenizer(self, name: str) -> Tokenizer | None:
        """See AdapterStore. An adapter changes no vocabulary here."""
        return None

    def fingerprint(self, name: str) -> str:
        """See AdapterStore."""
        return self._in_place[name][1]

    def remove(self, name: str) -> None:
        """See AdapterStore."""
        if name in self._in_place:
            adapter, _ = self._in_place.pop(name)
            if self._applied == name:
                self._context.apply(None, 0.0)
                self._applied = None
            adapter.close()
        self._room.give_back(name)

    def apply(self, chunks: Sequence[Chunk]) -> None:
        """Make the next step one with the adapter and scale that all of its chunks name."""
        name, scale = chunks[0].adapter, chunks[0].adapter_scale
        assert all(chunk.adapter == name for chunk in chunks), "one adapter a step"
        assert name is None or all(chunk.adapter_scale == scale for chunk in chunks), "one scale a step"
        if name is None and self._applied is None:
            return
        self._context.apply(None if name is None else self._in_place[name][0], scale)
        self._applied = name
