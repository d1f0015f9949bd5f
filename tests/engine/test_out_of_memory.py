"""Steps for which there is no memory, and a device that is lost: who fails, and who goes on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from engine_runs import make_core, request, text_of
from fakes import BOS, FakeBackend, letters

from tightrope.backends.errors import DeviceLost, OutOfMemory
from tightrope.backends.protocol import Chunk
from tightrope.engine.core import EngineCore, StepResult
from tightrope.engine.errors import EngineError
from tightrope.engine.types import Delta

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.quick


class Tight(FakeBackend):
    """Has memory for so many chunks in a step."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.failures = 0

    def forward(self, chunks: Sequence[Chunk]) -> "Tensor":
        if len(chunks) > self.room:
            self.failures += 1
            raise OutOfMemory(f"out of memory in a step of {len(chunks)} chunks")
        return super().forward(chunks)


def expected(prompt: str, num_tokens: int = 20) -> str:
    token_ids = [BOS, *prompt.encode()]
    for _ in range(num_tokens):
        token_ids.append(letters(token_ids))
    return bytes(token_ids[-num_tokens:]).decode()


def run_out(core: EngineCore, *steps: StepResult) -> tuple[dict[str, list[Delta]], dict[str, EngineError]]:
    """Step to the end: the deltas by request, with those of `steps` before, and what became of those that failed."""
    results = list(steps)
    while core.has_work:
        results.append(core.step())
    deltas: dict[str, list[Delta]] = {}
    failed: dict[str, EngineError] = {}
    for result in results:
        failed |= dict(result.failed)
        for delta in result.deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
    core._backend.kv.check_integrity()
    return deltas, failed


def test_a_step_without_memory_fails_its_newest_request_and_the_others_go_on():
    backend = Tight(room=2)
    core = make_core(backend)
    before = []
    for name in ("first", "second"):
        core.add(core.prepare(request(name, f"{name}?")))
        before.append(core.step())
    core.add(core.prepare(request("third", "third?")))

    deltas, failed = run_out(core, *before)

    assert backend.failures == 1
    assert list(failed) == ["third"]
    assert failed["third"].message == "out of memory in a step of 3 chunks"
    assert failed["third"].code == "server_error"
    texts = {name: text_of(found) for name, found in deltas.items()}
    assert texts == {name: expected(f"{name}?") for name in ("first", "second")}


def test_as_many_go_as_there_is_no_memory_for_the_newest_first():
    backend = Tight(room=1)
    core = make_core(backend)
    names = ["a", "b", "c", "d"]
    for name in names:
        core.add(core.prepare(request(name, f"{name}?")))

    deltas, failed = run_out(core)

    assert list(failed) == ["d", "c", "b"]
    assert text_of(deltas["a"]) == expected("a?")


def test_all_choices_of_the_newest_request_fail_together():
    backend = Tight(room=2)
    core = make_core(backend)
    core.add(core.prepare(request("old", "old?")))
    core.step()
    core.add(core.prepare(request("new", "new?", n=3)))

    _, failed = run_out(core)

    assert list(failed) == ["new"]


def test_a_request_alone_that_finds_no_memory_fails_and_the_next_is_served():
    backend = Tight(room=0)
    core = make_core(backend)
    core.add(core.prepare(request("large", "large?")))
    assert list(run_out(core)[1]) == ["large"]

    backend.room = 1
    core.add(core.prepare(request("next", "next?")))
    deltas, failed = run_out(core)

    assert not failed
    assert text_of(deltas["next"]) == expected("next?")


def test_a_lost_device_is_no_failure_of_a_request():
    backend = FakeBackend()
    core = make_core(backend)
    core.add(core.prepare(request("r", "hello?")))

    def lost(chunks: Sequence[Chunk]) -> "Tensor":
        raise DeviceLost("cuda:0 is lost after a step of 7 tokens: CUDA error: an illegal memory access")

    backend.forward = lost  # type: ignore[method-assign]

    with pytest.raises(DeviceLost, match="cuda:0 is lost"):
        core.step()
