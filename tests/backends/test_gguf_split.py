"""Several cards for a GGUF file: --tensor-split and --split-mode mean what they mean to llama.cpp, and are counted."""

import ctypes
import re
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from gguf_headers import GIB, yi_34b
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.gguf.header import Header, TensorInfo
from tightrope.backends.gguf import backend, native
from tightrope.backends.gguf.cards import Card, chosen_of
from tightrope.backends.gguf.layout import Layout, Memory
from tightrope.backends.gguf.model_file import read_model
from tightrope.backends.gguf.plan import GGUFPlan, make_plan
from tightrope.backends.gguf.split import ROUNDED_ROWS, by_proportion
from tightrope.backends.locate import bundled_model
from tightrope.backends.memory import CardMemory
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick

YI = yi_34b()
ROW_BYTES = 7168 * 9 // 16


def with_matrices(header: Header) -> Header:
    """The same sizes, as matrices of rows of the model's width."""
    (file,) = header.files
    tensors = tuple(
        replace(tensor, dims=(7168, tensor.num_bytes // ROW_BYTES)) if tensor.num_bytes > ROW_BYTES else tensor
        for tensor in file.tensors
    )
    return replace(header, files=(replace(file, tensors=tensors),))


def memory(*cards: float, name: str = "CUDA") -> Memory:
    sizes = [int(size * GIB) for size in cards]
    return Memory(64 * GIB, tuple(Card(f"{name}{n}", CardMemory(size, size)) for n, size in enumerate(sizes)))


def plan(header: Header, free: Memory, **settings: object) -> GGUFPlan:
    return make_plan(ModelSettings.model_validate({"gpu_layers": -1, **settings}), header, free)


def fillings(made: GGUFPlan) -> list[int]:
    return made.layout.card_fillings(made.on_cards, made.num_cells, made.cache_type)


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 20.0, 24.0]), min_size=1, max_size=4).filter(any),
    st.integers(1, 130),
)
def test_slots_go_to_cards_as_llama_cpp_gives_them(proportions: list[float], num_slots: int) -> None:
    """Restated from llama-model.cpp, in its float32: upper_bound of il / n among the cumulated shares."""
    ends = np.cumsum(np.array(proportions, np.float32), dtype=np.float32)
    ends /= ends[-1]
    theirs = [bisect_right(ends.tolist(), float(np.float32(i) / np.float32(num_slots))) for i in range(num_slots)]

    counts = by_proportion(proportions, num_slots, len(proportions) + 1)

    assert counts[-1] == 0
    assert sum(counts) == num_slots
    # A slot on the very edge may go to either of two neighbours, by the rounding of 32 bits.
    assert all(abs(count - theirs.count(card)) <= 1 for card, count in enumerate(counts[:-1]))
    again = bisect_right(
        (np.cumsum(np.array(counts, np.float32)) / np.float32(num_slots)).tolist(), np.float32(0.5) / num_slots
    )
    assert counts[again] > 0


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any))
def test_the_counts_that_llama_cpp_is_given_come_out_as_they_went_in(counts: list[int]) -> None:
    total = sum(counts)
    ends = np.cumsum(np.array(counts, np.float32), dtype=np.float32)
    ends /= ends[-1]
    places = [bisect_right(ends.tolist(), float(np.float32(i) / np.float32(total))) for i in range(total)]

    assert [places.count(card) for card in range(len(counts))] == counts


def test_layers_are_shared_out_in_the_proportions_that_are_given() -> None:
    made = plan(YI, memory(40, 40), max_model_len=4096, tensor_split="3,1")

    assert made.on_cards == by_proportion([3, 1], 61, 2)
    assert 45 <= made.on_cards[0] <= 46
    layout = made.layout
    costs = [slot.weight_bytes + 0 for slot in layout.slots]
    kinds = [made.num_cells * slot.kv_heads * layout.shape.head_bytes(1, 1) for slot in layout.slots]
    ends = [0, *accumulate(made.on_cards)]
    rest = layout.card_workspace_bytes(made.num_cells, made.cache_type) + 320 * (1 << 20)
    assert made.cache_type.name == "f16"
    for card, size in enumerate(fillings(made)):
        mine = slice(ends[card], ends[card + 1])
        assert size == sum(costs[mine]) + int(sum(kinds[mine])) + rest


def test_a_card_that_gets_more_than_it_has_room_for_is_named_with_what_would_be_right() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(YI, memory(9, 40), max_model_len=4096, tensor_split="1,1")

    text = str(caught.value)
    assert re.search(r"need \d+\.\d\d GiB on CUDA0 by --tensor-split 1,1, beside the workspace, and \d+\.\d\d", text)
    assert "leave out --tensor-split" in text
    assert "\n" not in text
    assert sum(plan(YI, memory(9, 40), max_model_len=4096).on_cards) == 61


def test_a_window_that_nobody_asked_for_shrinks_to_what_the_proportions_leave() -> None:
    even, uneven = (plan(YI, memory(16, 16), tensor_split=split) for split in ("1,1", "5,4"))

    assert uneven.window < even.window < 200_000


def test_rows_that_are_split_take_of_each_card_their_share_of_every_matrix() -> None:
    header = with_matrices(YI)
    made = plan(header, memory(40, 40), max_model_len=4096, tensor_split="3,1", split_mode="row")

    layout, (first, second) = made.layout, made.on_cards
    assert layout.has_split_rows
    matrices = sum(slot.matrix_bytes for slot in layout.slots)
    assert matrices > 0.99 * sum(slot.weight_bytes for slot in layout.slots)
    taken = layout.taken(made.on_cards, 0, made.cache_type)
    rounded = ROUNDED_ROWS * sum(slot.row_bytes for slot in layout.slots)
    for share, size in zip((first / 61, second / 61), taken, strict=True):
        assert share * matrices <= size <= share * matrices + rounded + 61 * 4 * 7168 + 2
    assert any("each matrix's rows are shared so" in note for note in made.notes)


def test_without_proportions_rows_are_split_by_what_cards_have_free() -> None:
    made = plan(with_matrices(YI), memory(12, 24), max_model_len=2048, split_mode="row")

    assert sum(made.on_cards) == 61
    assert made.on_cards[0] < made.on_cards[1]
    assert all(
        size <= card.memory.free_bytes for size, card in zip(fillings(made), made.layout.memory.cards, strict=True)
    )


def test_a_model_that_one_card_holds_is_still_split_by_rows_where_that_is_asked_for() -> None:
    assert plan(with_matrices(YI), memory(40, 40), max_model_len=2048).on_cards == (61, 0)
    assert all(plan(with_matrices(YI), memory(40, 40), max_model_len=2048, split_mode="row").on_cards)


def test_experts_are_of_three_dimensions_and_stay_whole() -> None:
    (file,) = YI.files
    experts = TensorInfo("blk.3.ffn_up_exps.weight", (7168, 1024, 8), "Q4_K", 0, 8 * 1024 * ROW_BYTES)
    header = replace(YI, files=(replace(file, tensors=(*file.tensors, experts)),))

    layout = Layout.of(ModelSettings(gpu_layers=-1, split_mode="row"), header, memory(40, 40))

    assert layout.slots[3].matrix_bytes == 0
    assert layout.slots[3].expert_bytes == experts.num_bytes


def test_llama_cpp_is_told_of_rows_and_keeps_a_card_without_any_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory(24, 24, 24)
    cards = tuple(replace(card, pointer=n + 1) for n, card in enumerate(free.cards))
    monkeypatch.setattr(Card, "attends", lambda card, shape, kind: True)
    made = plan(
        with_matrices(YI), replace(free, cards=cards), max_model_len=2048, split_mode="row", tensor_split="1,0,1"
    )

    options = backend._model_options(made, lambda share: None)

    assert options.splits_rows
    assert options.devices == (1, 2, 3)
    assert options.layers_on == made.on_cards
    assert made.on_cards[1] == 0
    params = ll.llama_model_default_params()
    kept = native._place(params, options)
    assert params.split_mode == ll.LLAMA_SPLIT_MODE_ROW
    del kept


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"split_mode": "none"}, 1), ({}, 2), ({"split_mode": "row"}, 2), ({"tensor_split": "1"}, 2)],
)
def test_split_mode_none_takes_the_first_card(settings: dict[str, object], count: int) -> None:
    chosen = chosen_of(memory(24, 24).cards, ModelSettings.model_validate({"gpu_layers": -1, **settings}))

    assert [card.name for card in chosen] == ["CUDA0", "CUDA1"][:count]


@pytest.mark.parametrize(
    ("settings", "free", "reason"),
    [
        (
            {"tensor_split": "3,1,2"},
            memory(24, 24),
            "--tensor-split 3,1,2: .* 3 cards, and there are 2 cards; give 2 at",
        ),
        ({"tensor_split": "3,1"}, memory(24), "--tensor-split 3,1: .* 2 cards, and there is 1 card; give 1 at most"),
        (
            {"split_mode": "row"},
            memory(24, 24, name="Vulkan"),
            "--split-mode row: .* can't split rows on Vulkan0; take",
        ),
    ],
)
def test_what_the_cards_cannot_do_is_one_line(settings: dict[str, object], free: Memory, reason: str) -> None:
    with pytest.raises(BackendError, match=reason) as caught:
        chosen_of(free.cards, ModelSettings.model_validate({"gpu_layers": -1, **settings}))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tensor_split": "3,1"}, "--tensor-split 3,1, but no layer is on a card; add --gpu-layers -1"),
        ({"split_mode": "row"}, "--split-mode row, but no layer is on a card; add --gpu-layers -1"),
        ({"tensor_split": "1,1", "split_mode": "none", "gpu_layers": -1}, "and --split-mode none takes one; give one"),
    ],
)
def test_options_that_say_nothing_together_are_one_line(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        read_model(Path(bundled_model()), ModelSettings.model_validate(settings))


@pytest.mark.parametrize("text", ["", "0,0", "3;1", "3,-1", "1,inf", ",".join(["1"] * 17), "one"])
def test_proportions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tensor_split"):
        ModelSettings.model_validate({"tensor_split": text})


def test_ggml_is_asked_whether_a_card_can_split_rows() -> None:
    """The CPU is a device as well, and its library has no such buffers."""
    ll._lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p

    assert not Card("CPU", CardMemory(GIB, GIB), pointer=ll._lib.ggml_backend_dev_by_type(0)).splits_rows
    assert Card("CUDA0", CardMemory(GIB, GIB)).splits_rows
