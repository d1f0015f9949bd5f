"""The same RoPE settings mean the same rotation in both runners: llama.cpp's arithmetic beside RopeSpec's."""

import math
from pathlib import Path

import numpy as np
import pytest
from error_bounds import UNIT
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll
from rope_bounds import FACTOR

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import DataFile, Header, TensorInfo, Value
from tightrope.backends.gguf.rope import RopePlan, plan_rope
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import RopeSettings

pytestmark = pytest.mark.quick

TRAINED, HEAD_DIM, THETA = 4096, 64, 10000.0
ROUNDED = 1.001 * UNIT  # of float64 numbers, exponents of 64ths among them, once to float32
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": TRAINED,
    "rope_theta": THETA,
}


def shape(*tensors: str, **extra: Value) -> ModelShape:
    """The GGUF file of the same model."""
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 256,
        "llama.context_length": TRAINED,
        "llama.attention.head_count": 4,
        "llama.rope.freq_base": THETA,
        "llama.vocab_size": 100,
        **extra,
    }
    infos = tuple(TensorInfo(name, (32,), "F32", 0, 128) for name in tensors)
    path = Path("tiny.gguf")
    return ModelShape.of(Header(path, metadata, (DataFile(path, 0, infos),)))


def native_angles(plan: RopePlan, position: int) -> tuple[np.ndarray, float]:
    """Angles [D / 2] and their magnitude as llama.cpp computes them: ggml's rope with the context's parameters.

    Its base and scale are the file's where the plan leaves 0. YaRN's ramp goes from pair `low` to pair `high`, which
    turn 32 times and once within the original window.
    """
    base, scale = plan.freq_base or THETA, plan.freq_scale or 1.0
    pairs = np.arange(HEAD_DIM // 2)
    unscaled = position * base ** (-2.0 * pairs / HEAD_DIM)
    if plan.scaling_type != ll.LLAMA_ROPE_SCALING_TYPE_YARN:
        return unscaled * scale, 1.0

    def pair_of(turns: float) -> float:
        return HEAD_DIM * math.log(plan.yarn_orig_ctx / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0.0, math.floor(pair_of(32))), min(HEAD_DIM - 1.0, math.ceil(pair_of(1)))
    assert plan.yarn_ext_factor == 1
    mix = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
    return unscaled * scale * (1 - mix) + unscaled * mix, 1 + 0.1 * math.log(1 / scale)


@given(
    st.sampled_from(["linear", "ntk", "yarn"]),
    st.floats(1, 32),
    st.sampled_from([None, 1e5, 1e6]),
    st.sampled_from([None, 2048]),
    st.integers(1, 1000),
)
def test_linear_ntk_and_yarn_rotate_alike_in_both_runners(
    kind: str, factor: float, theta: float | None, original_len: int | None, position: int
):
    wanted = RopeSettings.model_validate({"kind": kind, "factor": factor, "theta": theta, "original_len": original_len})
    plan, spec = plan_rope(wanted, shape()), resolve_rope(CONFIG, wanted, 0)["default"]

    inv_freq, attention_factor = spec.frequencies(position)
    angles, magnitude = native_angles(plan, position)

    np.testing.assert_allclose(inv_freq.astype(float) * position, angles, rtol=ROUNDED)
    assert attention_factor == pytest.approx(magnitude, rel=FACTOR)
    assert plan.window == spec.window


@pytest.mark.parametrize("wanted", [{}, {"theta": 5e5}, {"kind": "none"}])
def test_without_a_factor_both_runners_rotate_alike_too(wanted: dict[str, object]):
    settings = RopeSettings.model_validate(wanted)
    plan, spec = plan_rope(settings, shape()), resolve_rope(CONFIG, settings, 0)["default"]

    np.testing.assert_allclose(spec.frequencies(1)[0], native_angles(plan, 1)[0], rtol=ROUNDED)
    assert plan.window == spec.window == TRAINED


@pytest.mark.parametrize(
    ("wanted", "tensors", "message"),
    [
        ({"kind": "dynamic", "factor": 2}, [], "'dynamic' can't be chosen for a GGUF file.*linear, ntk and yarn work"),
        ({"kind": "longrope"}, ["rope_factors_long.weight"], "'longrope' can't be chosen for a GGUF file"),
        ({"kind": "llama3"}, [], "this GGUF file holds no such factors"),
        ({"kind": "llama3", "factor": 8}, ["rope_freqs.weight"], "holds its own factors; leave --rope-factor out"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_in_one_line(wanted: dict[str, object], tensors: list[str], message: str):
    with pytest.raises(BackendError, match=message) as caught:
        plan_rope(RopeSettings.model_validate(wanted), shape(*tensors))

    assert "\n" not in str(caught.value)


def test_the_factors_of_a_gguf_file_are_kept_and_named():
    file = shape("rope_freqs.weight")

    own = plan_rope(RopeSettings(kind="llama3"), file)
    stretched = plan_rope(RopeSettings(kind="linear", factor=2), file)

    assert (own.window, own.scaling_type, own.freq_scale) == (TRAINED, None, 0.0)
    assert own.how == "no scaling with a factor for each frequency"
    assert stretched.how == "linear scaling by 2 on top of the factors in the file"


@pytest.mark.parametrize(
    ("wanted", "metadata", "line"),
    [
        ({}, {}, "rope: no scaling, trained window 4096 tokens, served window 9000"),
        ({"kind": "none"}, {}, "rope: no scaling, trained window 4096 tokens, served window 9000"),
        ({"kind": "yarn", "factor": 4}, {}, "rope: yarn scaling by 4, trained window 4096 tokens, served window 9000"),
        (
            {},
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024},
            "rope: yarn scaling by 4, trained window 1024 tokens, served window 9000",
        ),
    ],
)
def test_the_line_at_start_names_kind_factor_and_both_windows(
    wanted: dict[str, object], metadata: dict[str, Value], line: str
):
    file = shape(**{f"llama.rope.scaling.{key}": value for key, value in metadata.items()})

    assert plan_rope(RopeSettings.model_validate(wanted), file).describe(9000) == line
