"""What a card holds, by the real planner on folders of headers: the cases that people with 24 GB ask for."""

import re
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from hf_folders import LLAMA_33B, YI_34B, gptq, yi_34b

from tightrope.backends import memory
from tightrope.backends.detect import outline
from tightrope.backends.errors import BackendError
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.plan import make_plan
from tightrope.backends.hf.room import room_on
from tightrope.backends.memory import CARD_RESERVE, CardMemory
from tightrope.backends.planning import CacheChoice, Outline
from tightrope.backends.settings import ModelSettings

GIB = 1 << 30
DESKTOP, WHOLE = 22.8, 23.4  # GiB that the driver of a card of 24 GB calls free, beside a desktop and without one
HOST = 8 * GIB
PAGE = ROOT / "docs/plan.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("card")
    return {
        "exl2": yi_34b(folder / "exl2", 4.65),
        "gptq": gptq(folder / "gptq", YI_34B),
        "llama": gptq(folder / "llama", LLAMA_33B),
    }


def on_card(folder: Path, gib: float, host_bytes: int = HOST, **settings: object) -> Outline:
    given = ModelSettings.model_validate({"model": str(folder), **settings})
    return outline(given, host_bytes, (int(gib * GIB),))


def choice(found: Outline, name: str) -> CacheChoice:
    return next(cache for cache in found.caches if cache.name == name)


@pytest.mark.parametrize(
    ("name", "gib", "dtype", "window"),
    [
        ("exl2", DESKTOP, "q8", 24_000),
        ("exl2", WHOLE, "q8", 30_000),
        ("gptq", DESKTOP, "q8", 24_000),
        ("gptq", WHOLE, "q8", 24_000),
        ("llama", WHOLE, "q8", 8_000),
        ("llama", WHOLE, "q4", 15_000),
    ],
)
def test_the_windows_that_a_card_of_24_gb_is_bought_for_fit(
    folders: dict[str, Path], name: str, gib: float, dtype: str, window: int
):
    found = on_card(folders[name], gib, max_model_len=window, cache={"dtype": dtype})

    assert found.refusal is None
    assert found.chosen is not None
    assert found.chosen.cache_tokens >= window
    assert choice(found, dtype).fitting >= window
    taken = found.weight_bytes + found.workspace_bytes + found.chosen.cache_bytes + CARD_RESERVE
    assert taken <= gib * GIB


def test_the_page_on_plans_tells_what_fits(folders: dict[str, Path]):
    told = re.findall(r"^\| (?:Yi|LLaMA)-3.B, .* \|(.*)\|(.*)\|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    fitting = [
        tuple(
            choice(on_card(folder, gib), dtype).fitting
            for gib, dtype in ((DESKTOP, "q8"), (WHOLE, "q8"), (WHOLE, "q4"))
        )
        for folder in folders.values()
    ]

    assert [tuple(int(cell.replace(",", "")) for cell in row) for row in told] == fitting


def test_the_page_on_plans_tells_what_is_left_of_a_card():
    assert re.findall(r"\b(\d+) MiB (?:are left|for what)", PAGE.read_text("utf-8")) == [str(CARD_RESERVE >> 20)] * 2


def test_the_memory_of_a_card_is_none_for_a_model_on_the_cpu(folders: dict[str, Path]):
    with pytest.raises(
        BackendError,
        match=r"^--device cpu and cards that --devices or --device-memory names contradict each other; give only one",
    ):
        on_card(folders["exl2"], WHOLE, device="cpu")


def test_steps_shrink_where_the_plan_is_tight_and_are_long_where_it_is_not(folders: dict[str, Path]):
    sizes = {}
    for window in (8_000, 31_500):
        found = on_card(folders["exl2"], WHOLE, max_model_len=window).chosen
        assert found is not None
        sizes[window] = found.step_tokens
        is_said = any(note.startswith(f"steps: {found.step_tokens} tokens at most") for note in found.notes)
        assert is_said is (found.step_tokens < 2048)

    assert sizes[8_000] == 2048 > sizes[31_500] >= 256


def test_without_a_window_it_is_what_fits_on_the_card(folders: dict[str, Path]):
    settings = {"rope": {"kind": "linear", "factor": 50}}  # of 4,096 tokens

    found = on_card(folders["exl2"], DESKTOP, **settings)

    assert found.chosen is not None
    assert 24_000 <= found.window < 200_000
    assert f"window: {found.window} tokens, what memory holds of the 204800 that the model is made for" in (
        found.chosen.notes
    )


def test_the_16384_tokens_of_a_model_without_grouped_heads_want_two_cards_with_q8(folders: dict[str, Path]):
    one = on_card(folders["llama"], WHOLE, max_model_len=16_384)

    assert one.refusal is not None
    assert "ask for at most" in one.refusal
    assert on_card(folders["llama"], 29.0, max_model_len=16_384).refusal is not None
    assert on_card(folders["llama"], 30.5, max_model_len=16_384).refusal is None


def test_the_embedding_lies_in_the_machines_memory_which_must_have_room_for_it(folders: dict[str, Path]):
    found = on_card(folders["exl2"], WHOLE)

    assert found.host_bytes == 2 * 64_000 * 7168
    short = on_card(folders["exl2"], WHOLE, host_bytes=found.host_bytes - 1)
    assert short.refusal == (
        "the embedding takes 0.85 GiB of the machine's own memory, and 0.85 GiB is free there: free some memory"
    )
    assert short.weight_bytes == found.weight_bytes


def test_a_fraction_of_the_cards_memory_is_taken_of_the_whole(folders: dict[str, Path]):
    whole = on_card(folders["exl2"], 30)
    part = on_card(folders["exl2"], 30, gpu_memory_fraction=0.8)

    assert part.memory_bytes == on_card(folders["exl2"], 24).memory_bytes < whole.memory_bytes
    assert CardMemory(20 * GIB, 24 * GIB).usable_bytes(0.9) == 20 * GIB - CARD_RESERVE
    assert CardMemory(20 * GIB, 24 * GIB).usable_bytes(0.5) == 12 * GIB - CARD_RESERVE
    assert CardMemory(0, 24 * GIB).usable_bytes(1) == 0


@pytest.mark.parametrize("name", ["exl2", "gptq", "llama"])
def test_serve_counts_as_the_plan_for_a_named_card_does(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    """What its driver says is stood in for: the rest is what the backend calls."""
    size = int(WHOLE * GIB)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 32 * GIB)  # The real one changes meanwhile.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))
    settings = ModelSettings(model=str(folders[name]))
    device = torch.device("cuda")
    found = inspect(folders[name], settings, device)

    made = make_plan(settings, found.shape, room_on(device, settings, found.blueprint, 0))

    named = on_card(folders[name], WHOLE).chosen
    assert named is not None
    assert (made.num_pages * 16, made.cache_bytes, made.step_tokens) == (
        named.cache_tokens,
        named.cache_bytes,
        named.step_tokens,
    )
    assert named.notes[: len(made.notes)] == made.notes


def test_the_machines_memory_is_no_part_of_what_a_card_holds(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "MEMORY_SHARE", 0.1)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 32 * GIB)  # The real one changes meanwhile.

    assert on_card(folders["gptq"], WHOLE, HOST) == on_card(folders["gptq"], WHOLE, 64 * GIB)
