"""The seam between the front and the engine: requests in, deltas out.

One engine in a process of its own, one in a thread of this process, and a pool of them look the same from here.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from tightrope.engine.types import Delta, GenerateRequest, ModelInfo, Prompt, Stats, TokenRun, TurnMarks

FindMarks = Callable[[ModelInfo], Awaitable[TurnMarks]]


class Engine(Protocol):
    """A model that answers requests. All of it belongs to one event loop, and nothing here blocks that.

    While the model is loading, restarting or gone, whatever asks it raises EngineUnavailable.
    """

    # ---- life ----

    async def start(self, find_marks: FindMarks | None = None) -> None:
        """Begin to load the model; returns at once.

        `find_marks` is asked of every model that was loaded, before requests reach it. If it raises OSError, as a
        timeout does, that engine is not used: the first fails with a line, and a later one is started again.
        """

    async def wait_ready(self) -> ModelInfo:
        """Wait until the model is loaded. Raises BackendFailed with one line if it can't be."""

    async def wait_failed(self) -> str:
        """Wait until no engine will be started any more, other than by `close`; returns the reason."""

    async def close(self) -> None:
        """End the engine. What is still running ends with EngineUnavailable."""

    # ---- state, read at any time ----

    @property
    def info(self) -> ModelInfo | None:
        """The loaded model; None before its first start."""

    @property
    def load_share(self) -> float:
        """How much of the model is loaded, from 0 to 1, as far as is known."""

    @property
    def adapters(self) -> Mapping[str, str]:
        """Paths of the adapters that requests may use, by name."""

    @property
    def stats(self) -> Stats:
        """The loop's counters, as of its last step."""

    @property
    def is_healthy(self) -> bool:
        """Whether the model answers: it is loaded, and no step has been under way for too long."""

    @property
    def private_bytes(self) -> int:
        """The machine's memory that it has to itself now, and that is free when it has ended."""

    @property
    def restarts(self) -> int:
        """How often an engine was started again."""

    @property
    def num_running(self) -> int:
        """Answers that are being written now."""

    @property
    def num_waiting(self) -> int:
        """Answers that wait for a place now."""

    @property
    def retry_after_s(self) -> int:
        """Seconds after which one who is refused now may find a place, or an engine where there is none."""

    def check_room(self, num_coming: int = 0) -> None:
        """Raises Overloaded if no more requests may wait, beside so many that will be asked for in a moment."""

    # ---- requests ----

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Run a request; yield the deltas of its `n` choices as they come, until all have finished.

        A refused request raises an EngineError at the first step, a failing one later. Closing the iterator cancels
        the work.
        """

    async def tokenize(self, prompt: Prompt, adapter: str | None = None, *, last: int | None = None) -> TokenRun:
        """The tokens of a prompt as it would be run, or the last few. Raises InvalidRequest."""

    async def detokenize(self, token_ids: Sequence[int], adapter: str | None = None) -> str:
        """The text of token ids, special ones included. Raises InvalidRequest."""

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Load an adapter from the folder of the settings; when this returns, `adapters` has it.

        in_place: one of that name gives way to it. Raises InvalidRequest.
        """

    async def unload_adapter(self, name: str) -> None:
        """Let no new request name an adapter; those that use it finish. Raises ModelNotFound."""
