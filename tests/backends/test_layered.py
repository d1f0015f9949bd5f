"""A model in layers on several devices, through the whole backend: the same logits, pages and answers as on one."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS
from torch import Tensor

from tightrope.backends.errors import BackendError, DoesNotFit, OutOfMemory
from tightrope.backends.hf import backend as hf_backend
from tightrope.backends.hf import layered as layered_module
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.layer_split import Place, SplitRoom, each_apart
from tightrope.backends.hf.layered import Layered, open_layered
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.plan import cache_dtype
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.backends.tensor_parallel import ALONE
from tightrope.kernels.forms.layout import PAGE

CPU, GIB = torch.device("cpu"), 1 << 30
FOLDER, ADAPTER = ADAPTERS / "llama-bf16", ADAPTERS / "llama-lora-r4"
SETTINGS = ModelSettings(
    max_model_len=256,
    max_num_seqs=4,
    threads=1,
    cache=CacheSettings(tokens=512, dtype="q8"),
    adapters={"mine": str(ADAPTER)},
)
PROMPT = tuple(range(5, 175))


def places_of(folder: Path, settings: ModelSettings) -> list[Place]:
    """Two stretches of the machine's memory, the first of which holds but one layer."""
    blueprint = inspect(folder, settings, CPU, ALONE, partial(each_apart, CPU)).blueprint
    room = SplitRoom.of(settings, blueprint, [Place(CPU, GIB)] * 2, 0, GIB)
    step, window = room.step_tokens[0], settings.max_model_len
    layer = room._costs(settings.cache.tokens // PAGE, cache_dtype(settings), step)[0][0]
    beside = room.workspace_of(0, 2).num_bytes(step, window) + room.sizes.before_on_host
    return [Place(CPU, beside + 3 * layer // 2), Place(CPU, GIB)]


def split(folder: Path, settings: ModelSettings) -> Layered:
    part = Layered(folder, settings, places_of(folder, settings), None, GIB)
    part.make_plan(settings)
    return part


@pytest.fixture
def on_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[HFBackend]:
    part = split(FOLDER, SETTINGS)
    monkeypatch.setattr(hf_backend, "open_part", lambda *given: (part, list(part.laid.notes)))
    with closing(HFBackend(FOLDER, SETTINGS, lambda _: None)) as loaded:
        yield loaded


@pytest.fixture
def on_one() -> Iterator[HFBackend]:
    with closing(HFBackend(FOLDER, SETTINGS, lambda _: None)) as loaded:
        yield loaded


def answers(backend: HFBackend, adapter: str | None = None) -> list[Tensor]:
    """Logits of a prompt in two steps, of three tokens behind it, and of a second sequence that begins alike."""
    kv = backend.kv
    kv.open(0, PROMPT, "")
    assert kv.reserve(0, len(PROMPT) + 3)
    found = []
    for start, end in ((0, 100), (100, 170)):
        found.append(backend.forward([Chunk(0, PROMPT[start:end], start, "all", adapter=adapter)]))
        kv.commit(0, start, PROMPT[start:end])
    for place in range(3):
        found.append(backend.forward([Chunk(0, (7 + place,), len(PROMPT) + place, "last", adapter=adapter)]))
        kv.commit(0, len(PROMPT) + place, (7 + place,))
    kv.close(0, keep=True)
    other = (*PROMPT[:70], *range(200, 230))
    start = kv.open(1, other, "").num_tokens
    assert 0 < start <= 70
    assert kv.reserve(1, len(other))
    found.append(backend.forward([Chunk(1, other[start:], start, "all", adapter=adapter)]))
    kv.commit(1, start, other[start:])
    kv.close(1, keep=True)
    return found


@pytest.mark.parametrize("adapter", [None, "mine"])
def test_two_devices_give_the_bits_of_one_through_steps_copies_and_reused_pages(
    on_one: HFBackend, on_two: HFBackend, adapter: str | None
):
    assert len(on_two.runner.model.currents) == 2
    assert all(map(torch.equal, answers(on_one, adapter), answers(on_two, adapter)))
    assert on_two.card.max_model_len == on_one.card.max_model_len
    assert any(note.startswith("layers: 1 on cpu, ") for note in on_two.card.notes)


def test_pages_that_one_has_written_the_other_reads(on_one: HFBackend, on_two: HFBackend):
    """So a chat on disk is the same for both."""
    answers(on_one)
    answers(on_two)
    stored = on_one.read_pages([0, 1, 2], [])

    assert (stored == on_two.read_pages([0, 1, 2], [])).all()
    on_two.write_pages(stored, (3, 0), [(0, 9), (2, 10)], [])
    assert (on_two.read_pages([9, 10], []) == on_one.read_pages([0, 2], [])).all()


def test_an_error_of_a_later_device_is_that_of_the_step(on_two: HFBackend, monkeypatch: pytest.MonkeyPatch):
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    (stack,) = (module for module in on_two.runner.model.tree.modules() if hasattr(module, "carries"))
    (carry,) = stack.carries.values()  # type: ignore[union-attr, operator]
    monkeypatch.setattr(carry, "run", fails)
    on_two.kv.open(0, PROMPT, "")
    assert on_two.kv.reserve(0, 20)

    with pytest.raises(OutOfMemory, match="a step of 20 tokens"):
        on_two.forward([Chunk(0, PROMPT[:20], 0, "last")])


def test_a_model_that_the_first_place_holds_is_not_split():
    part = Layered(FOLDER, SETTINGS, [Place(CPU, GIB)] * 2, None, GIB)
    part.make_plan(SETTINGS)

    assert len(part.found.blueprint.parts) == 1
    assert part.laid.notes == ()


def test_places_that_hold_too_little_are_told_by_how_much():
    part = Layered(FOLDER, SETTINGS, [Place(CPU, 1 << 20)] * 2, None, GIB)

    with pytest.raises(DoesNotFit, match=r"need \d+\.\d\d GiB more than the machine's own memory"):
        part.make_plan(SETTINGS)


def test_layers_for_cards_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch):
    settings = SETTINGS.model_copy(update={"gpu_split": "auto"})

    with pytest.raises(BackendError, match=r"^--gpu-split: lays layers out on cards, and the model runs on the CPU"):
        open_layered(FOLDER, settings, CPU)
    monkeypatch.setattr(layered_module.faults, "num_cards", lambda: 2)
    monkeypatch.setattr(layered_module.faults, "of_card", lambda device: f"{device} computes wrong numbers")
    with pytest.raises(BackendError, match=r"^--gpu-split: cuda:1 computes wrong numbers$"):
        open_layered(FOLDER, settings, torch.device("cuda", 0))
