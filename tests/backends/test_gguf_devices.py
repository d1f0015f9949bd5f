"""What is said of a card beside a GGUF file, and of the cards that llama.cpp finds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_headers import GIB, yi_34b

from tightrope.backends.devices.host import Host
from tightrope.backends.errors import DoesNotFit
from tightrope.backends.gguf import backend, cards, layout
from tightrope.backends.gguf.cards import Card, unused
from tightrope.backends.gguf.plan import make_plan
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick

HOST = Host(True, "580.65.06", (), (Path("/dev/null"),), has_memory_node=True, is_wsl=False)


def have(found: list[Card], monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> Iterator[tuple[str | None, Card]]:
        yield from ((None, card) for card in found)

    monkeypatch.setattr(cards, "_devices", devices)


def test_a_card_that_nothing_is_put_on_is_told_with_what_would(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cards, "_kinds", lambda: ["CUDA"])
    assert unused(ModelSettings(), HOST) == "there is an NVIDIA card: --gpu-layers -1 puts all layers on it"
    monkeypatch.setattr(cards, "_kinds", list)
    assert unused(ModelSettings(), HOST) == (
        "there is an NVIDIA card: this llama-cpp-python was built for the CPU; reinstall it with "
        "CMAKE_ARGS=-DGGML_CUDA=on"
    )


def test_nothing_is_told_where_there_is_no_card_or_its_use_was_decided():
    assert unused(ModelSettings(), replace(HOST, has_card=False)) == ""
    assert unused(ModelSettings(gpu_layers=-1), HOST) == ""
    assert unused(ModelSettings(device="cpu"), HOST) == ""


@pytest.mark.plain
def test_the_line_stands_among_those_of_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "look", lambda: HOST)
    loaded = backend.GGUFBackend(bundled_model(), ModelSettings(max_model_len=256), lambda share: None)
    loaded.close()

    assert loaded.card.notes[0].startswith("device: cpu; there is an NVIDIA card: ")


def test_a_file_that_the_machine_has_no_room_for_is_refused_with_the_card_that_may_have(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(layout, "look", lambda: HOST)
    monkeypatch.setattr(layout, "free_for", lambda settings: 16 * GIB)
    monkeypatch.setattr(cards, "_kinds", lambda: ["CUDA"])
    settings = ModelSettings()
    here, named = (layout.memory_of(settings, size, None) for size in (None, 16 * GIB))

    with pytest.raises(DoesNotFit, match=r"; there is an NVIDIA card: --gpu-layers -1 puts all layers on it$"):
        make_plan(settings, yi_34b(), here)
    with pytest.raises(DoesNotFit, match=r"free some memory$"):  # Another machine's may have none.
        make_plan(settings, yi_34b(), named)


def test_a_build_is_described_with_the_cards_that_it_finds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cards, "_kinds", lambda: ["CUDA"])
    have([Card("CUDA0", 23 << 30, "NVIDIA GeForce RTX 3090"), Card("CUDA1", 11 << 30)], monkeypatch)
    assert cards.describe() == "built for CUDA, finds CUDA0 (NVIDIA GeForce RTX 3090), CUDA1"
    have([], monkeypatch)
    assert cards.describe() == "built for CUDA, finds no card"
    monkeypatch.setattr(cards, "_kinds", list)
    assert cards.describe() == "built for the CPU"
