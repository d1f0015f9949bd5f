"""The adapters that requests may name, loaded and let go while others are being answered."""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tightrope.backends.adapters import find_adapter
from tightrope.backends.errors import BackendError
from tightrope.backends.protocol import AdapterStore, Tokenizer
from tightrope.engine.errors import BackendFailed, EngineError, InvalidRequest, ModelNotFound
from tightrope.engine.process.wire import AdapterList, CallFailed, EngineEnd, ErrorFrame, LoadAdapter, UnloadAdapter

log = logging.getLogger("tightrope.engine")

Action = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Served:
    key: str  # The backend knows it by this, which is another one each time that the name is loaded.
    path: str


class Adapters:
    """Names and what they stand for. `prepare` may run in any thread, one at a time; the rest runs between steps."""

    def __init__(self, store: AdapterStore, paths: Mapping[str, str]) -> None:
        """paths: of the adapters that are in place, by name."""
        self._store = store
        self._served = {name: _Served(name, path) for name, path in paths.items()}
        self._leaving: set[str] = set()  # No new request can name these keys.
        self._numbers = count(1)
        self._marks: tuple[Collection[str], Collection[str]] = ((), ())

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        """What Tokenizer.set_marks is told of the adapters' own vocabularies; before the first request."""
        self._marks = marks, ends
        for served in self._served.values():
            self._mark(served.key)

    def _mark(self, key: str) -> None:
        if (tokenizer := self._store.tokenizer(key)) is not None:
            tokenizer.set_marks(*self._marks)

    def special_texts(self) -> tuple[str, ...]:
        """Of the adapters' own vocabularies."""
        tokenizers = (self._store.tokenizer(served.key) for served in self._served.values())
        return tuple(dict.fromkeys(text for known in tokenizers if known is not None for text in known.special_texts()))

    def tokenizer(self, name: str) -> Tokenizer | None:
        """The adapter's own; None where it has the model's. Raises ModelNotFound."""
        return self._store.tokenizer(self._get(name, "model").key)

    @property
    def paths(self) -> dict[str, str]:
        """The adapters that requests may name."""
        return {name: served.path for name, served in self._served.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of the adapters that requests may name."""
        return {name: self._store.fingerprint(served.key) for name, served in self._served.items()}

    def served(self, name: str) -> tuple[str, str]:
        """What chunks call the adapter, and its fingerprint. Raises ModelNotFound."""
        key = self._get(name, "model").key
        return key, self._store.fingerprint(key)

    def _get(self, name: str, param: str) -> _Served:
        if name not in self._served:
            raise ModelNotFound(f"The model `{name}` does not exist.", param)
        return self._served[name]

    def prepare(self, name: str, path: Path, *, in_place: bool = False) -> Action:
        """Read an adapter; the result, called between steps, serves it.

        A name that stands for this path already is left as it is. in_place: one that is loaded gives way to the new
        one. Both raise EngineError, and then nothing has changed.
        """
        if self._is_served(name, path, in_place=in_place):
            return lambda: None
        key = f"{name}\0{next(self._numbers)}"
        with _told():
            put_in_place = self._store.prepare(key, path)

        def serve() -> None:
            try:
                if self._is_served(name, path, in_place=in_place):
                    self._store.remove(key)
                    return
                with _told():
                    put_in_place()
                self._mark(key)
            except EngineError:
                self._store.remove(key)
                raise
            if name in self._served:
                self._leaving.add(self._served[name].key)
            self._served[name] = _Served(key, str(path))

        return serve

    def _is_served(self, name: str, path: Path, *, in_place: bool) -> bool:
        """Whether there is nothing to do. Raises InvalidRequest when the name is taken."""
        served = self._served.get(name)
        if served is None or in_place:
            return False
        if Path(served.path).expanduser().resolve() != path.resolve():
            raise InvalidRequest(
                f"{name!r} is loaded from {served.path}: unload it first, or set load_inplace", "lora_name"
            )
        return True

    def unload(self, name: str) -> None:
        """Let no new request name the adapter; it goes when nobody uses it. Raises ModelNotFound."""
        self._leaving.add(self._get(name, "lora_name").key)
        del self._served[name]

    @property
    def has_leaving(self) -> bool:
        """Whether some are unloaded and still in use, as far as is known."""
        return bool(self._leaving)

    def free(self, used: Collection[str | None]) -> None:
        """Forget the adapters that are unloaded and not among these keys."""
        for key in self._leaving.difference(used):
            self._store.remove(key)
            self._leaving.remove(key)

    def restore(self, paths: Mapping[str, str]) -> None:
        """Serve these, as an engine before this one did; what can't be loaded any more is left out, and logged."""
        for name in [name for name, served in self._served.items() if paths.get(name) != served.path]:
            self.unload(name)
        self.free(())
        for name in [name for name in paths if name not in self._served]:
            try:
                self.prepare(name, Path(paths[name]))()
            except EngineError as error:
                log.warning("adapter not loaded again: name=%s reason=%s", name, error.message)


@contextmanager
def _told() -> Iterator[None]:
    """Raise what a backend says of an adapter as an EngineError."""
    try:
        yield
    except BackendError as error:
        raise InvalidRequest(str(error), "lora_path") from None
    except (MemoryError, OSError, RuntimeError) as error:  # torch raises a RuntimeError.
        log.exception("adapter not loaded")
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BackendFailed(f"the adapter can't be loaded: {reason}") from None


class AdapterCalls:
    """Answers the front's calls: files are read in a thread beside the loop, and put in place between its steps."""

    def __init__(
        self, adapters: Adapters, folder: str | None, end: EngineEnd, between_steps: Callable[[Action], None]
    ) -> None:
        """folder: where adapters may lie; between_steps: has the loop run something soon."""
        self._adapters = adapters
        self._folder = folder
        self._end = end
        self._between_steps = between_steps
        self._one_at_a_time = threading.Lock()

    def load(self, call: LoadAdapter) -> None:
        """Begin to load an adapter; returns at once."""
        threading.Thread(target=self._load, args=(call,), name="adapter", daemon=True).start()

    def unload(self, call: UnloadAdapter) -> None:
        """Have an adapter unloaded between two steps."""
        self._between_steps(lambda: self._finish(call.call_id, lambda: self._adapters.unload(call.name)))

    def _load(self, call: LoadAdapter) -> None:
        try:
            with self._one_at_a_time:
                serve = self._adapters.prepare(call.name, self._find(call.path), in_place=call.in_place)
        except EngineError as error:
            self._end.send(CallFailed(call.call_id, ErrorFrame.of(error)))
        except Exception:  # Otherwise nobody would answer the call.
            log.exception("adapter not loaded: name=%s", call.name)
            self._end.send(CallFailed(call.call_id, ErrorFrame.of(BackendFailed("the adapter can't be loaded"))))
        else:
            self._between_steps(lambda: self._finish(call.call_id, serve))

    def _find(self, path: str) -> Path:
        if self._folder is None:
            raise InvalidRequest("no folder of adapters was named at the start", "lora_path")
        with _told():
            return find_adapter(self._folder, path)

    def _finish(self, call_id: int, action: Action) -> None:
        """Do it, and tell the front how that went."""
        try:
            action()
        except EngineError as error:
            self._end.send(CallFailed(call_id, ErrorFrame.of(error)))
        else:
            self._end.send(AdapterList(call_id, self._adapters.paths, self._adapters.special_texts()))
