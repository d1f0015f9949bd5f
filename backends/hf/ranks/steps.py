"""Steps that all ranks run at the same time: where one of them can't end a step, none does, and the next one runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from tightrope.backends.errors import BackendError, DeviceLost, OutOfMemory
from tightrope.backends.hf.modules.gather import Gather
from tightrope.backends.hf.ranks.gather import SharedGather
from tightrope.backends.hf.ranks.messages import Ended, EndStep, MeetAgain
from tightrope.backends.hf.ranks.processes import Ranks, answers, answers_of


class Steps:
    """The first rank's side of them."""

    def __init__(self, ranks: Ranks, gather: Gather) -> None:
        """gather: the first rank's own."""
        self._ranks, self._gather = ranks, gather

    @contextmanager
    def step(self) -> Iterator[None]:
        """This rank's part of a step of which the others have been told.

        Raises the BackendError of the rank that couldn't end it, and DeviceLost where the others can't be had back from
        a gather that this rank doesn't come to.
        """
        gather = self._gather
        if not isinstance(gather, SharedGather):
            with among_others():
                yield
            return
        try:
            yield
        except BackendError:
            gather.leave_step()
            self._meet_again(gather)
            raise
        if gather.has_any_left:
            raise self._meet_again(gather)

    def _meet_again(self, gather: SharedGather) -> BackendError:
        """Wait until no rank is in a step, and have all count their meetings alike; returns what another says."""
        ended = answers_of(Ended, self._ranks.ask(EndStep()))
        gather.meet_again(gather.num_meetings)
        answers(self._ranks.ask(MeetAgain(gather.num_meetings)))
        for process, other in zip(self._ranks.processes, ended, strict=True):
            if other.error is not None:
                return (OutOfMemory if other.is_out_of_memory else BackendError)(f"{process.name}: {other.error}")
        return BackendError("a rank has left a step, and none says why")


@contextmanager
def among_others() -> Iterator[None]:
    """Work that the others do, too, and of which they tell nothing: where this rank fails, they have gone on."""
    try:
        yield
    except BackendError as error:
        raise DeviceLost(f"the first of several ranks has failed: {error}") from error
