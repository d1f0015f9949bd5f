"""The adapters of a model in several ranks: the first rank's own, and the others' in the same slots."""

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.adapters.rows import Adapters
from tightrope.backends.hf.ranks.messages import PrepareAdapter, PutAdapter, RemoveAdapter
from tightrope.backends.hf.ranks.processes import Ranks, answers
from tightrope.backends.protocol import Tokenizer


class RankedAdapters:
    """An AdapterStore over all ranks, which are told of every change in the same order."""

    def __init__(self, own: Adapters, ranks: Ranks) -> None:
        """own: of this rank."""
        self._own, self._ranks = own, ranks

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        """See AdapterStore. All ranks read the files at the same time, each what is its own."""
        asked = self._ranks.ask(PrepareAdapter(name, str(path)))
        with self._or_nowhere(name):
            try:
                put = self._own.prepare(name, path)
            finally:
                wait(asked)  # What one of them hasn't yet prepared, it couldn't forget.
            answers(asked)

        def put_in_place() -> None:
            asked = self._ranks.ask(PutAdapter(name))
            with self._or_nowhere(name):
                put()
                answers(asked)

        return put_in_place

    def tokenizer(self, name: str) -> Tokenizer | None:
        """See AdapterStore."""
        return self._own.tokenizer(name)

    def fingerprint(self, name: str) -> str:
        """See AdapterStore."""
        return self._own.fingerprint(name)

    def remove(self, name: str) -> None:
        """See AdapterStore."""
        self._ranks.tell(RemoveAdapter(name))
        self._own.remove(name)

    @contextmanager
    def _or_nowhere(self, name: str) -> Iterator[None]:
        """Where a rank can't have the adapter, none keeps it."""
        try:
            yield
        except BackendError:
            self.remove(name)
            raise
