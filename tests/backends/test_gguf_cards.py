"""Layers on cards are planned by the cards' memory, and what stays with the host by the host's."""

import ctypes
import re
from dataclasses import replace
from itertools import combinations_with_replacement
from math import prod

import pytest
from gguf_headers import GIB, mixtral_8x7b, yi_34b
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.gguf.header import Header, TensorInfo
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.gguf import cards
from tightrope.backends.gguf.cache_types import CACHE_TYPES
from tightrope.backends.gguf.cards import Card
from tightrope.backends.gguf.layout import Layout, Memory
from tightrope.backends.gguf.plan import GGUFPlan, make_plan
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.gguf.split import filled, spread
from tightrope.backends.memory import CARD_RESERVE, CardMemory
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick

YI, MIXTRAL = yi_34b(), mixtral_8x7b()
YI_TOKEN = {"f16": 60 * 8 * 128 * 2 * 2, "q8": 60 * 8 * 128 * 2 * 34 // 32, "q4": 60 * 8 * 128 * 2 * 18 // 32}


def card(name: str, gib: float = 24, *, shares_host: bool = False) -> Card:
    return Card(name, CardMemory(int(gib * GIB), int(gib * GIB)), shares_host=shares_host)


def memory(host: float, *cards: float) -> Memory:
    """What is free, in GiB."""
    return Memory(int(host * GIB), tuple(card(f"CUDA{n}", size) for n, size in enumerate(cards)))


def plan(header: Header, free: Memory, **settings: object) -> GGUFPlan:
    return make_plan(ModelSettings.model_validate({"gpu_layers": -1, **settings}), header, free)


def card_bytes(made: GGUFPlan) -> list[int]:
    """Bytes that are planned for on each card."""
    return made.layout.card_fillings(made.on_cards, made.num_cells, made.cache_type)


def test_a_file_larger_than_the_hosts_memory_goes_onto_a_card_that_holds_it() -> None:
    made = plan(YI, memory(16, 23.4), max_model_len=24_000)

    assert made.on_cards == (61,)
    assert (made.window, made.cache_type.name) == (24_000, "q8")
    assert 24_000 <= made.num_cells < 32_768
    assert made.layout.host_weight_bytes == 64_000 * 7168 // 256 * 144  # the embedding's table


def test_a_host_with_much_memory_does_not_lend_it_to_a_card() -> None:
    for host in (32, 64, 512):
        made = plan(YI, memory(host, 23.4))
        weights = YI.weight_bytes - made.layout.host_weight_bytes
        cache = made.num_cells * YI_TOKEN[made.cache_type.name]
        assert weights + cache < card_bytes(made)[0] <= 23.4 * GIB


def test_without_a_window_asked_for_the_window_is_what_fits_and_a_line_says_so() -> None:
    made = plan(YI, memory(64, 23.4))

    assert 24_000 <= made.window < 32_768
    assert made.num_cells == made.window
    assert f"window: {made.window} tokens, what memory holds of the 200000 that the model is made for" in made.notes


def test_a_start_tells_where_layers_lie_and_what_they_take() -> None:
    (line,) = (note for note in plan(YI, memory(64, 23.4), max_model_len=8192).notes if note.startswith("layers: "))
    assert re.fullmatch(
        r"layers: 61 on CUDA0, 2\d\.\d\d of 23\.40 GiB; of 61 with the output; 0\.24 GiB of weights in .* memory", line
    )


@pytest.mark.parametrize("gib", [21.0, 21.5, 22.0, 22.5, 23.0, 24.0, 26.0, 30.0, 40.0, 80.0])
def test_keys_and_values_are_of_one_type_on_a_card_whatever_fits(gib: float) -> None:
    made = plan(YI, memory(64, gib), step_tokens=64)

    assert made.cache_type.key_type == made.cache_type.value_type
    assert made.cache_type.name in ("f16", "q8")


def test_a_type_that_a_card_has_no_kernel_for_is_not_chosen_and_told_of_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Card, "attends", lambda card, shape, kind: kind.name == "f16" or card.name == "CUDA1")

    assert plan(YI, memory(64, 23.4)).cache_type.name == "f16"
    assert not any(note.startswith("attention: ") for note in plan(YI, memory(64, 23.4)).notes)
    asked = plan(YI, memory(64, 40, 40), cache={"dtype": "q8"})
    (line,) = (note for note in asked.notes if note.startswith("attention: "))
    assert "CUDA0 has no kernel" in line
    assert "on the CPU" in line


def test_of_some_layers_those_on_the_card_and_the_rest_are_counted_each_in_its_place() -> None:
    made = plan(YI, memory(64, 23.4), gpu_layers=30, max_model_len=24_000)

    assert made.on_cards == (30,)
    layer = next(slot.weight_bytes for slot in made.layout.slots)
    output = made.layout.slots[-1].weight_bytes
    cache = made.num_cells * YI_TOKEN[made.cache_type.name] // 60  # of a layer
    assert made.layout.card_need(made.num_cells, made.cache_type) == 29 * (layer + cache) + output
    workspace = made.layout.workspace_bytes(made.num_cells)
    host = made.layout.input_bytes + 31 * (layer + cache)
    assert made.layout.host_need(made.num_cells, made.cache_type) == host + workspace


def test_a_host_that_is_too_small_for_the_other_layers_is_the_one_that_refuses() -> None:
    with pytest.raises(DoesNotFit, match=r"leave 1\d\.\d\d GiB for the host's memory, and 7\.20 GiB is free"):
        plan(YI, memory(8, 23.4), gpu_layers=30, max_model_len=24_000)


def test_a_host_that_is_too_small_is_helped_by_more_layers_on_a_card_that_has_room() -> None:
    with pytest.raises(DoesNotFit, match=r"GiB is free: put (\d+) layers there \(--gpu-layers \1\)") as caught:
        plan(YI, memory(8, 23.4), gpu_layers=30, max_model_len=4096)

    layers = int(re.findall(r"--gpu-layers (\d+)", str(caught.value))[0])
    assert plan(YI, memory(8, 23.4), gpu_layers=layers, max_model_len=4096).on_cards == (layers,)
    with pytest.raises(DoesNotFit):
        plan(YI, memory(8, 23.4), gpu_layers=layers - 1, max_model_len=4096)


def test_the_advice_of_a_refusal_helps() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(YI, memory(64, 16), max_model_len=24_000)

    text = str(caught.value)
    assert re.match(r"61 layers and a cache of 24000 tokens as q8 need \d\d\.\d\d GiB beside the workspace, and", text)
    assert "\n" not in text
    layers = re.search(r"--gpu-layers (\d+)", text)
    assert layers is not None
    made = plan(YI, memory(64, 16), max_model_len=24_000, gpu_layers=int(layers[1]))
    assert made.on_cards == (int(layers[1]),)
    with pytest.raises(DoesNotFit):
        plan(YI, memory(64, 16), max_model_len=24_000, gpu_layers=int(layers[1]) + 1)


def test_a_shorter_window_or_a_smaller_cache_is_advised_where_one_fits() -> None:
    with pytest.raises(
        DoesNotFit, match=r"take --kv-cache q8, or take --kv-cache q4, or put .* ask for at most (\d+)"
    ) as caught:
        plan(YI, memory(64, 23.4), max_model_len=24_000, cache={"dtype": "f16"})

    most = int(str(caught.value).split()[-2])
    assert plan(YI, memory(64, 23.4), max_model_len=most, cache={"dtype": "f16"}).num_cells >= most
    with pytest.raises(DoesNotFit):
        plan(YI, memory(64, 23.4), max_model_len=most + 1, cache={"dtype": "f16"})


def test_two_cards_hold_what_one_does_not_and_none_more_than_it_has() -> None:
    free = memory(64, 12, 16)
    made = plan(YI, free, max_model_len=16_384, cache={"dtype": "f16", "tokens": 16_384})

    assert sum(made.on_cards) == 61
    assert all(made.on_cards)
    for used, each in zip(card_bytes(made), free.cards, strict=True):
        assert used <= each.memory.free_bytes
    line = next(note for note in made.notes if note.startswith("layers: "))
    assert f"{made.on_cards[0]} on CUDA0, " in line
    assert f"{made.on_cards[1]} on CUDA1, " in line


def test_a_fraction_of_the_whole_card_is_all_that_is_taken() -> None:
    made = plan(YI, memory(64, 48), max_model_len=4096, gpu_memory_fraction=0.5)

    assert card_bytes(made)[0] <= 24 * GIB
    assert made.window == 4096
    with pytest.raises(DoesNotFit):
        plan(YI, memory(64, 48), max_model_len=4096, gpu_memory_fraction=0.4)


def test_a_model_that_one_card_holds_is_left_on_one() -> None:
    made = plan(MIXTRAL, memory(64, 48, 48), max_model_len=4096)

    assert made.on_cards == (33, 0)


def test_experts_that_stay_with_the_host_are_counted_there_and_named_to_llama_cpp() -> None:
    whole, most = (plan(MIXTRAL, memory(64, 48), max_model_len=4096, n_cpu_moe=n) for n in (0, 20))

    expert = 3 * 8 * 14_336 * 4096 * 9 // 16
    moved = 20 * expert
    assert most.layout.host_weight_bytes - whole.layout.host_weight_bytes == moved
    cells, kind = whole.num_cells, whole.cache_type
    assert whole.layout.card_need(cells, kind) - most.layout.card_need(cells, kind) == moved
    names = [tensor.name for tensor in MIXTRAL.tensors]
    pattern = most.layout.host_tensors
    assert pattern is not None
    found = [name for name in names if re.search(pattern, name)]
    assert found == [f"blk.{n}.ffn_{part}_exps.weight" for n in range(20) for part in ("gate", "up", "down")]
    assert whole.layout.host_tensors is None


def test_a_prompts_product_with_weights_of_the_host_has_room_on_the_card() -> None:
    """llama.cpp sends such weights to the card, one tensor at a time."""
    whole, part = (plan(MIXTRAL, memory(64, 48), max_model_len=4096, n_cpu_moe=n) for n in (0, 1))

    more = part.layout.card_workspace_bytes(4096, part.cache_type) - whole.layout.card_workspace_bytes(
        4096, whole.cache_type
    )
    assert more == 8 * 14_336 * 4096 * 9 // 16


MATRIX = (7168, 20_480)  # of the feed-forward part of Yi-34B


def typed(kind: str, *dims: int) -> Header:
    """The same model in numbers, with one more matrix of another type."""
    (file,) = YI.files
    numbers = (replace(tensor, type_name="F16") for tensor in file.tensors)
    extra = TensorInfo("blk.0.extra.weight", dims, kind, 0, prod(dims) // 4)
    return replace(YI, files=(replace(file, tensors=(*numbers, extra)),))


@pytest.mark.parametrize(
    ("kind", "dims", "name", "description", "copied"),
    [
        ("IQ1_M", MATRIX, "CUDA0", "NVIDIA GeForce RTX 3090", 2 * prod(MATRIX)),
        ("IQ1_M", (*MATRIX, 8), "CUDA0", "", 2 * prod(MATRIX)),  # of one of eight experts
        ("IQ1_M", MATRIX, "Vulkan0", "NVIDIA GeForce RTX 3090", 0),
        ("Q4_K", MATRIX, "CUDA0", "NVIDIA GeForce RTX 3090", 0),
        ("Q4_K", MATRIX, "CUDA0", "NVIDIA TITAN RTX", 0),
        ("Q4_K", MATRIX, "CUDA0", "Tesla V100-SXM2-32GB", 2 * prod(MATRIX)),
        ("Q4_K", MATRIX, "CUDA0", "Tesla V100S-PCIE-32GB", 2 * prod(MATRIX)),
        ("Q4_K", MATRIX, "CUDA0", "NVIDIA TITAN V", 2 * prod(MATRIX)),
        ("Q4_K", MATRIX, "CUDA0", "Quadro GV100", 2 * prod(MATRIX)),
        ("F16", MATRIX, "CUDA0", "Tesla V100-SXM2-32GB", 0),
    ],
)
def test_a_matrix_that_a_card_unpacks_for_a_prompt_has_room_there(
    kind: str, dims: tuple[int, ...], name: str, description: str, copied: int
) -> None:
    free = Memory(64 * GIB, (Card(name, CardMemory(40 * GIB, 40 * GIB), description),))
    settings = ModelSettings(gpu_layers=-1)
    plain = Layout.of(settings, typed("F32", *dims), free)
    q8 = CACHE_TYPES["q8"]

    asked = Layout.of(settings, typed(kind, *dims), free)

    assert asked.card_workspace_bytes(4096, q8) - plain.card_workspace_bytes(4096, q8) == copied


def test_the_types_that_a_card_unpacks_are_ones_that_files_have() -> None:
    names = {kind.name for kind in TENSOR_TYPES.values()}

    assert {name for name in names if not card("CUDA0").multiplies(name)} == {"IQ1_M", "TQ1_0", "TQ2_0"}


def test_experts_are_advised_to_the_host_where_a_card_is_too_small_for_them() -> None:
    with pytest.raises(DoesNotFit, match=r"\(--n-cpu-moe (\d+)\)") as caught:
        plan(MIXTRAL, memory(64, 12), max_model_len=8192)

    match = re.search(r"--n-cpu-moe (\d+)", str(caught.value))
    assert match is not None
    made = plan(MIXTRAL, memory(64, 12), max_model_len=8192, n_cpu_moe=int(match[1]))
    assert card_bytes(made)[0] <= 12 * GIB


def test_an_output_that_shares_the_embeddings_table_takes_a_copy_of_it_on_a_card() -> None:
    tied = yi_34b(is_tied=True)
    table = 64_000 * 7168 // 256 * 144

    made = plan(tied, memory(64, 40), max_model_len=4096)
    assert made.layout.slots[-1].copied_bytes == table
    assert made.layout.host_weight_bytes == table
    with_host = plan(tied, memory(64), gpu_layers=0, max_model_len=4096)
    assert with_host.layout.host_weight_bytes == tied.weight_bytes


def test_what_an_integrated_card_takes_is_taken_from_the_host() -> None:
    integrated = card("Vulkan0", 40, shares_host=True)
    assert plan(YI, Memory(64 * GIB, (integrated,)), max_model_len=24_000).on_cards == (61,)
    with pytest.raises(DoesNotFit, match="for the host's memory"):
        plan(YI, Memory(16 * GIB, (integrated,)), max_model_len=24_000)


def test_adapters_are_counted_with_the_layers() -> None:
    settings = ModelSettings(gpu_layers=-1, max_model_len=4096)
    plain, adapted = (Layout.of(settings, YI, memory(64, 40), size) for size in (0, 60 << 20))
    kind = plan(YI, memory(64, 40), max_model_len=4096).cache_type

    assert adapted.card_need(4096, kind) - plain.card_need(4096, kind) == 60 << 20


def test_a_card_with_less_than_the_reserve_holds_nothing() -> None:
    with pytest.raises(DoesNotFit, match=r"need .* beside the workspace"):
        plan(YI, memory(8, CARD_RESERVE / GIB / 2), max_model_len=4096)


# ---- the cards' own part of the row ----


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.lists(st.integers(-5, 120), min_size=1, max_size=3))
def test_a_row_of_slots_fits_when_some_cut_of_it_does(costs: list[int], rooms: list[int]) -> None:
    cuts = combinations_with_replacement(range(len(costs) + 1), len(rooms) - 1)
    pieces = ([costs[a:b] for a, b in zip((0, *cut), (*cut, len(costs)), strict=True)] for cut in cuts)
    is_possible = any(
        all(not piece or sum(piece) <= room for piece, room in zip(cut, rooms, strict=True)) for cut in pieces
    )

    assert bool(filled(costs, rooms)) == is_possible
    if is_possible:
        counts = spread(costs, rooms)
        ends = [sum(counts[: n + 1]) for n in range(len(counts))]
        assert ends[-1] == len(costs)
        for count, end, room in zip(counts, ends, rooms, strict=True):
            assert not count or sum(costs[end - count : end]) <= room


def test_cards_that_are_both_needed_are_filled_alike() -> None:
    assert spread([10] * 30, [200, 200]) == (15, 15)
    assert spread([10] * 30, [150, 300]) == (10, 20)
    assert spread([10] * 30, [320, 300]) == (30, 0)


# ---- which cards there are ----


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [
        ([("0000:01:00.0", card("CUDA0")), ("0000:02:00.0", card("CUDA1"))], ["CUDA0", "CUDA1"]),
        ([("0000:01:00.0", card("CUDA0")), ("0000:01:00.0", card("Vulkan0"))], ["CUDA0"]),
        ([(None, card("Vulkan0")), (None, card("Vulkan1"))], ["Vulkan0", "Vulkan1"]),
        ([(None, card("Vulkan0", shares_host=True)), (None, card("Vulkan1"))], ["Vulkan1"]),
        ([(None, card("Vulkan0", shares_host=True)), (None, card("Vulkan1", shares_host=True))], ["Vulkan0"]),
    ],
)
def test_a_card_counts_once_and_an_integrated_one_where_there_is_no_other(
    devices: list[tuple[str | None, Card]], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "_devices", lambda: iter(devices))

    assert [found.name for found in cards.cards_for(ModelSettings(gpu_layers=-1))] == chosen
    assert cards.cards_for(ModelSettings()) == ()


@pytest.mark.parametrize(
    ("device", "chosen"), [("auto", ["CUDA0", "CUDA1"]), ("cuda", ["CUDA0", "CUDA1"]), ("cuda:1", ["CUDA1"])]
)
def test_a_device_names_the_cards_that_layers_go_to(
    device: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "_devices", lambda: iter([(None, card("CUDA0")), (None, card("CUDA1"))]))

    assert [found.name for found in cards.cards_for(ModelSettings(gpu_layers=-1, device=device))] == chosen


@pytest.mark.parametrize(
    ("device", "layers", "reason"),
    [
        ("cuda:1", -1, r"--device cuda:1: llama\.cpp sees CUDA0$"),
        ("cuda", 0, "--device cuda: of a GGUF file --gpu-layers says how many layers go there; -1 is all$"),
        ("cpu", 20, "--device cpu and --gpu-layers 20 contradict each other; give only one of them$"),
    ],
)
def test_a_device_that_contradicts_the_layers_or_is_not_there_is_refused(
    device: str, layers: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "_devices", lambda: iter([(None, card("CUDA0"))]))

    with pytest.raises(BackendError, match=reason):
        cards.cards_for(ModelSettings(gpu_layers=layers, device=device))


def test_layers_for_a_card_that_is_not_there_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_devices", lambda: iter(()))

    with pytest.raises(BackendError, match=r"^gpu_layers is -1, but (this llama-cpp-python was|llama\.cpp's) "):
        cards.cards_for(ModelSettings(gpu_layers=-1))


def test_a_device_is_asked_for_its_kernel_by_ggmls_own_question() -> None:
    """The CPU is a device as well, with attention over all types. Rows that blocks don't fill make no cache."""
    ll._lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    cpu = Card("CPU", CardMemory(GIB, GIB), pointer=ll._lib.ggml_backend_dev_by_type(0))
    shape = ModelShape.of(YI)

    assert all(cpu.attends(shape, kind) for kind in CACHE_TYPES.values())
    assert cpu.attends(replace(shape, kv_heads=(0,) * 60), CACHE_TYPES["q8"])
    odd = replace(shape, key_dim=80, value_dim=80)
    assert [cpu.attends(odd, CACHE_TYPES[name]) for name in ("f16", "q8", "q4")] == [True, False, False]
