"""Layers on a card, for real and without one: llama.cpp's Vulkan build on a software renderer.

`make vulkan` builds the one, finds the other, and runs these tests; nothing else collects them.
"""

import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS
from gguf_files import write_model
from gguf_models import lone_logits
from llama_buffers import allocated, listen
from real_server import run_server

from tightrope.backends.detect import outline
from tightrope.backends.errors import DoesNotFit
from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.gguf import layout as gguf_layout
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.cache_types import CACHE_TYPES
from tightrope.backends.gguf.cards import Card, cards_for
from tightrope.backends.gguf.layout import Memory
from tightrope.backends.gguf.plan import make_plan
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.locate import bundled_model
from tightrope.backends.memory import CARD_RESERVE, CardMemory
from tightrope.backends.settings import ModelSettings

pytestmark = [pytest.mark.slow, pytest.mark.vulkan]

# Between kernels that round in other places, as in test_gguf_backend: a wrong token costs more than 0.1 nats.
MOST_DIVERGENCE = 0.01
SLOTS = 31  # The bundled model has 30 layers, and its output behind them.
ALL = ModelSettings(gpu_layers=-1)


def settings(**more: object) -> ModelSettings:
    return ModelSettings.model_validate(
        {"gpu_layers": -1, "max_model_len": 1024, "cache": {"dtype": "q8", "tokens": 1024}, **more}
    )


def load(path: Path, chosen: ModelSettings) -> closing[GGUFBackend]:
    return closing(GGUFBackend(path, chosen, lambda _: None))


def divergence(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of [n, V] and [n, V]."""
    expected, logits = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((expected.exp() * (expected - logits)).sum(-1).mean())


@pytest.fixture(scope="module")
def expected() -> Iterator[tuple[list[int], torch.Tensor]]:
    """Some text, and its logits with everything on the CPU."""
    with load(bundled_model(), settings(gpu_layers=0)) as backend:
        words = "The Danube rises in the Black Forest and flows through ten countries before it meets the Black Sea."
        token_ids = backend.tokenizer.encode(words, parse_special=False, is_start=True)
        yield token_ids, lone_logits(backend, token_ids)


@pytest.fixture(scope="module")
def card() -> Card:
    return cards_for(ALL)[0]


def test_a_card_says_its_name_and_what_it_has_free(card: Card) -> None:
    assert card.name == "Vulkan0"
    assert "llvmpipe" in card.description
    assert CARD_RESERVE < card.memory.free_bytes <= card.memory.total_bytes


@pytest.mark.parametrize("layers", [-1, SLOTS - 1, 10, 1])
def test_layers_on_a_card_give_the_cpus_answers_and_take_no_more_than_was_planned(
    layers: int, expected: tuple[list[int], torch.Tensor], card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    token_ids, logits = expected
    listen(caplog)
    with load(bundled_model(), settings(gpu_layers=layers)) as backend:
        found = allocated(caplog)
        assert divergence(lone_logits(backend, token_ids), logits) < MOST_DIVERGENCE
        notes = backend.card.notes
    on_card = SLOTS if layers < 0 else layers
    assert any(note.startswith(f"layers: {on_card} on Vulkan0 (") for note in notes)
    assert f"offloaded {on_card}/{SLOTS} layers to GPU" in caplog.text

    header = read_header(bundled_model())
    layout = make_plan(settings(gpu_layers=layers), header, memory(card)).layout
    kind = CACHE_TYPES["q8"]
    weights_and_cache = found["Vulkan0", "model"] + found["Vulkan0", "KV"]
    assert weights_and_cache == pytest.approx(layout.card_need(1024, kind), rel=0.01, abs=1 << 20)
    assert found["Vulkan0", "compute"] <= layout.card_workspace_bytes(1024, kind)
    assert found["CPU", "model"] == pytest.approx(layout.host_weight_bytes, rel=0.01, abs=1 << 20)


def memory(card: Card) -> Memory:
    return Memory(64 << 30, (card,))


def test_no_layer_on_a_card_takes_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    listen(caplog)
    with load(bundled_model(), settings(gpu_layers=0)):
        assert {device for device, _ in allocated(caplog)} == {"CPU"}


def test_two_cards_share_a_model_as_planned(
    expected: tuple[list[int], torch.Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are the same renderer, and each is said to have too little for the whole model."""
    token_ids, logits = expected
    header = read_header(bundled_model())
    (first, second) = cards_for(ALL)
    layout = make_plan(settings(), header, memory(first)).layout
    kind = CACHE_TYPES["q8"]
    each = layout.card_need(1024, kind) * 2 // 3 + layout.card_workspace_bytes(1024, kind) + CARD_RESERVE
    small = tuple(replace(card, memory=CardMemory(each, each)) for card in (first, second))
    monkeypatch.setattr(gguf_layout, "cards_for", lambda _: small)

    listen(caplog)
    with load(bundled_model(), settings()) as backend:
        found = allocated(caplog)
        assert divergence(lone_logits(backend, token_ids), logits) < MOST_DIVERGENCE
    plan = make_plan(settings(), header, Memory(64 << 30, small))
    assert sum(plan.on_cards) == SLOTS
    assert all(plan.on_cards)
    fillings = plan.layout.card_fillings(plan.on_cards, 1024, kind)
    for name, filling in zip(("Vulkan0", "Vulkan1"), fillings, strict=True):
        lying = found[name, "model"] + found[name, "KV"]
        planned = filling - CARD_RESERVE - plan.layout.card_workspace_bytes(1024, kind)
        assert lying == pytest.approx(planned, rel=0.01, abs=1 << 20)


def test_experts_stay_with_the_host_and_answer_as_on_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model(ADAPTERS / "mixtral-bf16", tmp_path / "mixtral.gguf")
    token_ids = [1, *range(5, 40)]
    plain = {"cache": {"dtype": "f16", "tokens": 256}, "max_model_len": 128}
    with load(path, settings(gpu_layers=0, **plain)) as backend:
        logits = lone_logits(backend, token_ids)
    sizes = []
    for experts in (0, 1, 99):
        listen(caplog)
        with load(path, settings(n_cpu_moe=experts, **plain)) as backend:
            sizes.append(allocated(caplog)["Vulkan0", "model"])
            assert divergence(lone_logits(backend, token_ids), logits) < MOST_DIVERGENCE
        assert ("buffer type overridden to" in caplog.text) == (experts > 0)
    assert sizes == sorted(sizes, reverse=True)


def test_a_window_that_the_cards_do_not_hold_is_refused_though_the_host_would() -> None:
    header = read_header(bundled_model())
    token = ModelShape.of(header).cache_bytes(*[CACHE_TYPES["q8"].key_type] * 2)
    tokens = math.ceil(sum(card.memory.free_bytes for card in cards_for(ALL)) / token)

    with pytest.raises(
        DoesNotFit, match=r"31 layers and a cache of \d+ tokens as q8 need .* is free on Vulkan0 and Vulkan1"
    ):
        GGUFBackend(
            bundled_model(), settings(max_model_len=tokens, cache={"dtype": "q8", "tokens": tokens}), lambda _: None
        )


def test_plan_counts_what_serve_counts() -> None:
    chosen = settings(model=str(bundled_model()))
    with load(bundled_model(), chosen) as backend:
        served = backend.card.notes
    planned = outline(chosen, None).chosen
    assert planned is not None
    told = planned.notes[1:]  # The first line tells which engine runs.
    assert [note.split(", ")[0] for note in told] == [note.split(", ")[0] for note in served]


def test_the_card_tells_for_which_heads_and_types_it_has_a_kernel(card: Card) -> None:
    shape = ModelShape.of(read_header(bundled_model()))

    assert all(card.attends(shape, kind) for kind in CACHE_TYPES.values())
    assert not card.attends(replace(shape, key_dim=20, value_dim=20), CACHE_TYPES["f16"])


def test_the_server_answers_from_a_card() -> None:
    import httpx

    with run_server("--gpu-layers=-1", "--kv-cache=q8", "--max-model-len=1024") as server:
        assert "layers: 31 on Vulkan0 (" in server.output
        body = {
            "messages": [{"role": "user", "content": "Name three colours."}],
            "max_tokens": 16,
            "temperature": 0,
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()
    assert answer["choices"][0]["message"]["content"].strip()


def test_these_tests_run_on_a_renderer_that_needs_no_card() -> None:
    assert "lvp" in os.environ["VK_ICD_FILENAMES"]
