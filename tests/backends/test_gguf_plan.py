"""Window, cache and RoPE are decided from the header and the free memory, before anything is loaded."""

from pathlib import Path

import pytest

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import DataFile, Header, TensorInfo, Value
from tightrope.backends.gguf.layout import Memory
from tightrope.backends.gguf.plan import GGUFPlan, make_plan
from tightrope.backends.gguf.rope import plan_rope
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.memory import free_memory
from tightrope.backends.settings import ModelSettings, RopeSettings

pytestmark = pytest.mark.quick

GIB = 1 << 30
LAYERS, HEADS, HEAD_DIM = 32, 8, 128
F16_TOKEN = LAYERS * HEADS * HEAD_DIM * 2 * 2  # bytes of keys and values of one token: 128 KiB


def header(**extra: Value) -> Header:
    """An 8B model of 4 GiB, trained for 8,192 tokens."""
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": 14_336,
        "llama.context_length": 8192,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": HEADS,
        "llama.vocab_size": 32000,
        **extra,
    }
    return Header(
        Path("8b.gguf"), metadata, (DataFile(Path("8b.gguf"), 0, (TensorInfo("w", (1 << 33,), "Q4_0", 0, 4 * GIB),)),)
    )


def plan(gib: float, **settings: object) -> GGUFPlan:
    return make_plan(ModelSettings.model_validate(settings), header(), Memory(int(gib * GIB)))


def test_plenty_of_memory_gives_sixteen_bits_and_room_for_several_chats() -> None:
    made = plan(64)
    assert (made.window, made.num_cells, made.cache_type.name) == (8192, 32768, "f16")
    assert any("nothing is rounded" in note for note in made.notes)


@pytest.mark.parametrize(
    ("gib", "chosen"),
    [(6.0, "f16"), (5.55, "q8 keys, f16 values"), (5.3, "q8")],  # a window takes 1 GiB, 0.77 GiB or 0.53 GiB
)
def test_auto_takes_the_most_exact_type_that_holds_a_window(gib: float, chosen: str) -> None:
    made = plan(gib, step_tokens=64)
    assert made.cache_type.name == chosen
    assert made.num_cells >= 8192
    assert any(f"as {chosen}, " in note for note in made.notes)


def test_a_window_that_does_not_fit_is_refused_with_the_one_that_does() -> None:
    with pytest.raises(
        BackendError, match=r"8192 tokens as q8 needs 0\.53 GiB .* take --kv-cache q4, or ask for at most (\d+) tokens"
    ) as caught:
        plan(5.0, step_tokens=64, max_model_len=8192)
    fitting = int(str(caught.value).split()[-2])
    assert plan(5.0, step_tokens=64, max_model_len=fitting).num_cells >= fitting


def test_without_a_window_asked_for_it_is_what_fits_and_a_line_says_so() -> None:
    made = plan(5.0, step_tokens=64)
    assert (made.cache_type.name, made.window) == ("q8", made.num_cells)
    assert 1024 <= made.window < 8192
    assert f"window: {made.window} tokens, what memory holds of the 8192 that the model is made for" in made.notes
    with pytest.raises(BackendError, match="8192 tokens as q8 needs"):
        plan(4.6, step_tokens=64)  # less than anyone would want


def test_memory_is_never_promised_twice() -> None:
    for gib in (6, 8, 12, 24):
        made = plan(gib)
        assert 4 * GIB + made.num_cells * F16_TOKEN + made.run_bytes <= gib * GIB


def test_a_type_and_a_capacity_that_are_asked_for_are_kept() -> None:
    made = plan(64, cache={"tokens": 10000, "dtype": "q4"})
    assert (made.num_cells, made.cache_type.name) == (10240, "q4")  # llama.cpp rounds up to 256
    assert any("as asked" in note for note in made.notes)


def test_a_window_beyond_the_trained_one_is_noted() -> None:
    made = plan(64, max_model_len=16384)
    assert made.window == 16384
    assert any("more than the 8192" in note for note in made.notes)


def test_free_memory_is_a_part_of_the_machines() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < free_memory() < total


def rope(file: dict[str, Value] | None = None, **settings: object) -> tuple[object, ...]:
    """(window, type, base, scale, original window, YaRN's mix) for RoPE settings and the file's own metadata."""
    made = plan_rope(RopeSettings.model_validate(settings), ModelShape.of(header(**(file or {}))))
    scale = round(made.freq_scale, 6)
    return (made.window, made.scaling_type, round(made.freq_base), scale, made.yarn_orig_ctx, made.yarn_ext_factor)


def test_rope_kinds_mean_what_the_papers_say() -> None:
    assert rope() == (8192, None, 0, 0.0, 0, None)  # as the file has it
    assert rope(theta=5e5) == (8192, None, 500000, 0.0, 0, None)
    assert rope(kind="none") == (8192, 0, 0, 1.0, 0, None)
    assert rope(kind="linear", factor=4.0) == (32768, 1, 0, 0.25, 0, None)
    assert rope(kind="ntk", factor=4.0) == (32768, 0, round(10000 * 4 ** (128 / 126)), 1.0, 0, None)
    assert rope(kind="yarn", factor=4.0) == (32768, 2, 0, 0.25, 8192, 1.0)


def test_a_file_that_is_scaled_already_is_scaled_anew_from_its_original_window() -> None:
    file: dict[str, Value] = {
        "llama.context_length": 32768,
        "llama.rope.scaling.original_context_length": 8192,
        "llama.rope.freq_base": 1e6,
    }
    assert rope(file)[0] == 32768
    assert rope(file, kind="yarn", factor=2.0)[0] == 16384
    assert rope(file, kind="none")[0] == 8192


@pytest.mark.parametrize(
    ("settings", "reason"), [({"kind": "linear"}, "needs a factor"), ({"factor": 2.0}, "needs a kind")]
)
def test_half_a_rope_setting_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        rope(**settings)
