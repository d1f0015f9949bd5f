"""Window, cache and RoPE of the torch engine are decided from headers and free memory, before anything is loaded."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hf_folders import YI_34B, yi_34b
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.hf_config import ModelShape, read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.cache.window_pages import KEPT_WINDOWS, most_needed
from tightrope.backends.hf.host_workspace import HostWorkspace
from tightrope.backends.hf.plan import HFPlan, make_plan
from tightrope.backends.hf.room import CacheSizes, Room, host_room
from tightrope.backends.hf.workspace import token_bytes
from tightrope.backends.memory import MEMORY_SHARE, prompt_rows
from tightrope.backends.planning import LEAST_WINDOW
from tightrope.backends.settings import STEP_TOKENS, CacheSettings, ModelSettings
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat, LayerCache

pytestmark = pytest.mark.quick

GIB = 1 << 30
WINDOW = 24_000


@pytest.fixture(scope="module")
def yi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yi_34b(tmp_path_factory.mktemp("yi"))


def plan(folder: Path, gib: float, **settings: object) -> HFPlan:
    """The plan with `gib` to be used; a share of the free memory is left to others."""
    weights = Checkpoint.open(folder).weight_bytes
    free_bytes = math.ceil(gib * GIB / MEMORY_SHARE)
    return planned(ModelSettings.model_validate(settings), read_config(folder), weights, free_bytes)


def planned(settings: ModelSettings, shape: ModelShape, weight_bytes: int, free_bytes: int) -> HFPlan:
    return make_plan(settings, shape, room_of(settings, shape, weight_bytes, free_bytes))


def room_of(settings: ModelSettings, shape: ModelShape, weight_bytes: int, free_bytes: int) -> Room:
    return host_room(settings, HostWorkspace(settings, shape), weight_bytes, free_bytes)


def workspace_bytes(settings: ModelSettings, shape: ModelShape) -> int:
    return HostWorkspace(settings, shape).num_bytes(settings.step_tokens_on("cpu"), 0)


def shape(folder: Path, **changed: object) -> ModelShape:
    """The model's sizes, some of them changed."""
    return replace(read_config(folder), **changed)


def test_a_yi_34b_at_4_65_bits_holds_24000_tokens_in_24_gib_with_8_bits_and_not_with_16(yi: Path):
    weights = Checkpoint.open(yi).weight_bytes
    assert 18.5 * GIB < weights < 19.5 * GIB

    made = plan(yi, 24, max_model_len=WINDOW)

    assert (made.window, made.cache_dtype) == (WINDOW, "q8")
    assert made.num_pages * PAGE >= WINDOW
    assert weights + made.cache_bytes + made.workspace_bytes <= 24 * GIB
    with pytest.raises(
        DoesNotFit, match=r"24000 tokens as f16 needs .* take --kv-cache q8 or --kv-cache q4, or ask for"
    ):
        plan(yi, 24, max_model_len=WINDOW, cache={"dtype": "f16"})


def test_a_token_takes_120_kib_at_8_bits_and_240_at_16_before_scales(yi: Path):
    values = 2 * 60 * 8 * 128  # keys and values, layers, KV heads, head dimension
    scales = 2 * values // 32  # a float16 for each 32 values

    assert token_bytes(shape(yi), "q8") == 120 * 1024 + scales == values + scales
    assert token_bytes(shape(yi), "f16") == 240 * 1024
    assert token_bytes(shape(yi), "q4") == 60 * 1024 + scales


@given(st.sampled_from(["q8", "q4", "f16"]), st.integers(1, 3), st.integers(1, 4), st.sampled_from([32, 48, 80, 128]))
def test_the_planned_bytes_are_those_of_the_tensors(
    yi: Path, dtype: CacheDtype, num_layers: int, num_kv_heads: int, head_dim: int
):
    small = shape(yi, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
    caches = [LayerCache.allocate(CacheFormat(dtype, num_kv_heads, head_dim), 5) for _ in range(num_layers)]

    tensors = [t for c in caches for t in (c.key_codes, c.key_scales, c.value_codes, c.value_scales)]

    assert sum(t.nbytes for t in tensors) == 5 * PAGE * token_bytes(small, dtype)


def sliding(folder: Path, num_full: int, window: int = 1024) -> ModelShape:
    """The model with a sliding window in all but `num_full` of its 60 layers."""
    return shape(folder, windows=(window,) * (60 - num_full) + (None,) * num_full)


@pytest.mark.parametrize("num_full", [0, 10, 60])
@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
def test_layers_with_a_window_are_planned_with_the_pages_that_live_and_kept_windows_need(
    yi: Path, num_full: int, dtype: CacheDtype
):
    settings = ModelSettings.model_validate({"max_num_seqs": 2, "max_model_len": 30_000, "cache": {"dtype": dtype}})
    made = planned(settings, sliding(yi, num_full), 0, 400 * GIB)
    formats = CacheFormat(dtype, 8, 128)
    caches = [
        LayerCache.allocate(formats, made.num_window_pages if is_windowed else made.num_pages, "meta")
        for is_windowed in made.windowed
    ]

    assert made.windowed == (num_full < 60,) * (60 - num_full) + (False,) * num_full
    if num_full < 60:
        assert made.window_tokens == 1024
        assert made.num_window_pages == most_needed(1024, 2 + KEPT_WINDOWS, STEP_TOKENS) < made.num_pages
    tensors = [t for c in caches for t in (c.key_codes, c.key_scales, c.value_codes, c.value_scales)]
    assert sum(tensor.nbytes for tensor in tensors) == made.cache_bytes


def test_a_cache_that_is_shorter_than_the_windows_has_pages_of_one_kind(yi: Path):
    made = planned(ModelSettings(cache=CacheSettings(tokens=4096)), sliding(yi, 10), 0, 400 * GIB)

    assert made.windowed == (False,) * 60
    assert (made.window_tokens, made.num_window_pages) == (None, 0)
    assert made.cache_bytes == 4096 * made.token_bytes


@given(st.floats(0.5, 60), st.integers(0, 60), st.sampled_from([1, 4, 16]))
def test_as_many_pages_of_sliding_layers_fit_as_fill_the_room(yi: Path, gib: float, num_full: int, max_num_seqs: int):
    settings, model = ModelSettings(max_num_seqs=max_num_seqs), sliding(yi, num_full)
    sizes = CacheSizes.of(settings, model, "q8", STEP_TOKENS)
    room = room_of(settings, model, 0, int(gib * GIB / MEMORY_SHARE))
    left = room.spare_bytes - workspace_bytes(settings, model)

    fitting = room.fitting(settings, model, "q8", STEP_TOKENS)

    assert fitting == 0 or sizes.bytes_of(fitting) <= left
    if room.workspace.load_bytes(STEP_TOKENS) <= room.spare_bytes:
        assert num_full == 0 or sizes.bytes_of(fitting + 1) > left


@pytest.mark.plain
@given(st.floats(20, 200), st.sampled_from(["q8", "q4", "f16"]), st.sampled_from([16, 512, 2048]))
def test_the_largest_window_fits_and_a_page_more_does_not(yi: Path, gib: float, dtype: CacheDtype, step_tokens: int):
    settings = ModelSettings.model_validate({"cache": {"dtype": dtype}, "step_tokens": step_tokens})
    weights, free_bytes = Checkpoint.open(yi).weight_bytes, int(gib * GIB)
    most = room_of(settings, shape(yi), weights, free_bytes).largest_window(settings, shape(yi), dtype)
    if not most:
        return

    made = planned(settings.model_copy(update={"max_model_len": most}), shape(yi), weights, free_bytes)
    with pytest.raises(DoesNotFit, match=f"at most {most} tokens"):
        planned(settings.model_copy(update={"max_model_len": most + PAGE}), shape(yi), weights, free_bytes)

    assert made.window == most
    assert weights + made.cache_bytes + made.workspace_bytes <= free_bytes * MEMORY_SHARE


def test_without_a_window_it_is_what_fits_and_a_line_says_so(yi: Path):
    model, weights = shape(yi, trained_len=200_000, raw={**YI_34B, "max_position_embeddings": 200_000}), 0
    settings = ModelSettings()
    room = room_of(settings, model, weights, 6 * GIB)

    made = make_plan(settings, model, room)

    assert made.window == room.largest_window(settings, model, "q8") < 200_000
    assert made.num_pages * PAGE == made.window
    line = f"window: {made.window} tokens, what memory holds of the 200000 that the model is made for"
    assert line in made.notes
    asked = make_plan(settings.model_copy(update={"max_model_len": made.window}), model, room)
    assert (asked.rope, asked.cache_bytes) == (made.rope, made.cache_bytes)


def test_a_window_that_is_asked_for_is_refused_and_never_made_smaller(yi: Path):
    with pytest.raises(DoesNotFit, match="100000 tokens as q8 needs"):
        plan(yi, 24, max_model_len=100_000)
    with pytest.raises(DoesNotFit, match="100000 tokens as q8 needs"):
        plan(yi, 24, cache={"tokens": 100_000})


def test_nobody_is_served_a_window_without_room_for_a_message(yi: Path):
    weights, model, settings = Checkpoint.open(yi).weight_bytes, shape(yi), ModelSettings()
    least = workspace_bytes(settings, model) + weights + LEAST_WINDOW * token_bytes(model, "q8")

    assert planned(settings, model, weights, math.ceil(least / MEMORY_SHARE) + 1).window == LEAST_WINDOW
    with pytest.raises(DoesNotFit, match="ask for at most 1008 tokens"):
        planned(settings, model, weights, int((least - 1) / MEMORY_SHARE))


def test_plenty_of_memory_gives_room_for_several_chats_and_no_more(yi: Path):
    assert plan(yi, 200).num_pages * PAGE == 32768
    assert plan(yi, 200, max_model_len=50_000).num_pages * PAGE == 50_000
    assert plan(yi, 200, max_num_seqs=2).num_pages * PAGE == 2 * 4096
    assert plan(yi, 200, cache={"tokens": 10_001}).num_pages == 626


def test_weights_that_do_not_fit_are_refused_by_what_they_take(yi: Path):
    with pytest.raises(
        DoesNotFit,
        match=r"^weights and workspace take 19\.\d\d GiB, and 1\d\.\d\d GiB is free: take a smaller model, or ",
    ):
        plan(yi, 12)


def test_the_scaling_is_part_of_the_plan_and_its_notes(yi: Path):
    made = plan(yi, 64, rope={"kind": "linear", "factor": 8})

    assert (made.window, made.rope["default"].kind) == (32768, "linear")
    assert "rope: linear scaling by 8, theta 5000000, trained window 4096 tokens, served window 32768" in made.notes


def test_a_window_beyond_what_the_model_is_made_for_is_noted(yi: Path):
    notes = plan(yi, 64, max_model_len=10_000).notes

    assert any("10000 tokens, more than the 4096 that the model is made for" in note for note in notes)


def test_a_model_of_learned_positions_has_no_more_of_them(yi: Path):
    gpt2 = shape(yi, raw={"model_type": "gpt2"}, trained_len=1024)
    beyond = ModelSettings(max_model_len=2048)

    assert planned(ModelSettings(), gpt2, 0, 400 * GIB).window == 1024
    with pytest.raises(
        BackendError, match="2048 tokens is more than this model has positions for: ask for at most 1024"
    ):
        planned(beyond, gpt2, 0, 400 * GIB)


def test_the_workspace_grows_with_the_step_and_the_sequences(yi: Path):
    model = shape(yi, vocab_size=262_144)  # Of a short step, logits are the most.
    one, more = (ModelSettings(max_num_seqs=count, step_tokens=64) for count in (1, 9))
    small, large = ModelSettings(step_tokens=64), ModelSettings(step_tokens=1024)

    assert workspace_bytes(more, model) - workspace_bytes(one, model) >= 8 * model.vocab_size * 4
    assert workspace_bytes(large, model) - workspace_bytes(small, model) >= 960 * model.intermediate_size * 4


@pytest.mark.parametrize("step_tokens", [512, 8192])
def test_a_large_vocabulary_takes_no_more_for_the_logits_of_a_prompt_than_a_step_may_yield(yi: Path, step_tokens: int):
    settings = ModelSettings(max_num_seqs=1, step_tokens=step_tokens)
    large = shape(yi, vocab_size=262_144)
    assert prompt_rows(large.vocab_size, step_tokens) == 64

    more = workspace_bytes(settings, large) - workspace_bytes(settings, shape(yi, vocab_size=1))

    assert more <= 4 * (2 * 64 + 4) * large.vocab_size


@pytest.mark.parametrize("fields", [{"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_theta": -1.0}])
def test_a_scaling_that_cannot_be_is_found_before_memory_is_asked_for(yi: Path, fields: dict[str, object]):
    broken = shape(yi, raw={**YI_34B, **fields})

    with pytest.raises(BackendError, match=r"config\.json: rope_"):
        planned(ModelSettings(), broken, 0, 400 * GIB)
