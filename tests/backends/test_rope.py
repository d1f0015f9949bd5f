"""RoPE scaling: frequencies held to transformers' own functions, settings and files to what they may say."""

import math
from typing import Any

import numpy as np
import pytest
from error_bounds import UNIT
from hypothesis import given
from hypothesis import strategies as st
from rope_bounds import FACTOR, frequencies_off
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tightrope.backends.errors import BackendError
from tightrope.backends.rope.scaling import RopeSpec, resolve_rope
from tightrope.backends.settings import RopeSettings

pytestmark = pytest.mark.quick

factors = st.floats(1, 64, allow_nan=False).map(lambda x: round(x, 3))


def config(scaling: dict[str, Any] | None = None, **fields: object) -> dict[str, Any]:
    """A Llama of 4,096 tokens with heads of 64, in the old style."""
    return {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
        **fields,
    }


def resolve(
    scaling: dict[str, Any] | None = None, window: int = 0, *, wanted: dict[str, Any] | None = None, **fields: object
) -> RopeSpec:
    """The spec of the only kind of layer."""
    specs = resolve_rope(config(scaling, **fields), RopeSettings.model_validate(wanted or {}), window)
    assert list(specs) == ["default"]
    return specs["default"]


def assert_as_transformers(raw: dict[str, Any], spec: RopeSpec, length: int) -> None:
    own = LlamaConfig.from_dict(raw)
    kind = own.rope_parameters["rope_type"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](own, "cpu", seq_len=length)

    inv_freq, factor = spec.frequencies(length)

    assert inv_freq.dtype == np.float32
    off = np.abs(inv_freq.astype(np.float64) - expected.double().numpy())
    assert (off <= frequencies_off(spec, length)).all()
    assert factor == pytest.approx(attention_factor, rel=FACTOR)


@given(factors, st.sampled_from([64, 96, 128]), st.sampled_from([0.25, 0.5, 1.0]), st.floats(1e3, 1e7))
def test_linear_frequencies_are_transformers(factor: float, head_dim: int, share: float, theta: float):
    raw = config({"type": "linear", "factor": factor}, head_dim=head_dim, partial_rotary_factor=share, rope_theta=theta)
    spec = resolve_rope(raw, RopeSettings(), 0)["default"]

    assert_as_transformers(raw, spec, 100)
    assert (spec.kind, spec.rotary_dim, spec.window) == ("linear", int(head_dim * share), round(factor * 4096))


@given(factors, st.integers(1, 40_000), st.sampled_from([64, 128]))
def test_dynamic_frequencies_are_transformers_at_every_length(factor: float, length: int, head_dim: int):
    raw = config({"type": "dynamic", "factor": factor}, head_dim=head_dim)
    spec = resolve_rope(raw, RopeSettings(), 0)["default"]

    assert_as_transformers(raw, spec, length)
    assert spec.depends_on_length


@given(
    factors,
    st.fixed_dictionaries(
        {"original_max_position_embeddings": st.sampled_from([512, 2048, 4096])},
        optional={
            "beta_fast": st.integers(8, 64),
            "beta_slow": st.sampled_from([0.5, 1, 2, 4]),
            "mscale": st.sampled_from([0.5, 0.707, 1.0]),
            "mscale_all_dim": st.sampled_from([0.5, 0.8, 1.0]),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2),
        },
    ),
    st.sampled_from([64, 128]),
    st.sampled_from([1e4, 1e6]),
)
def test_yarn_frequencies_are_transformers(factor: float, extra: dict[str, Any], head_dim: int, theta: float):
    raw = config({"rope_type": "yarn", "factor": factor, **extra}, head_dim=head_dim, rope_theta=theta)
    spec = resolve_rope(raw, RopeSettings(), 0)["default"]

    assert_as_transformers(raw, spec, 100)
    assert spec.trained_len == extra["original_max_position_embeddings"]


@given(factors, st.floats(0.5, 2), st.floats(1.5, 8), st.sampled_from([1024, 2048]), st.sampled_from([1e4, 5e5]))
def test_llama3_frequencies_are_transformers(factor: float, low: float, ratio: float, original: int, theta: float):
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio}
    raw = config({"rope_type": "llama3", "original_max_position_embeddings": original, **scaling}, rope_theta=theta)
    spec = resolve_rope(raw, RopeSettings(), 0)["default"]

    assert_as_transformers(raw, spec, 100)
    assert (spec.trained_len, spec.window) == (original, 4096)


@given(
    st.lists(st.floats(1, 64), min_size=32, max_size=32),
    st.lists(st.floats(1, 2), min_size=32, max_size=32),
    st.sampled_from([None, 4.0]),
    st.sampled_from([None, 1.25]),
    st.integers(1, 4096),
)
def test_longrope_frequencies_are_transformers_at_every_length(
    long: list[float], short: list[float], factor: float | None, attention_factor: float | None, length: int
):
    scaling = {"type": "longrope", "long_factor": long, "short_factor": short, "factor": factor}
    scaling |= {"attention_factor": attention_factor, "original_max_position_embeddings": 1024}
    raw = config(scaling)
    spec = resolve_rope(raw, RopeSettings(), 0)["default"]

    assert_as_transformers(raw, spec, length)
    assert spec.depends_on_length
    assert (spec.trained_len, spec.window) == (1024, 4096)


@given(factors, st.sampled_from([64, 128]))
def test_ntk_is_a_larger_theta_whose_slowest_pair_turns_factor_times_slower(factor: float, head_dim: int):
    spec = resolve(wanted={"kind": "ntk", "factor": factor}, head_dim=head_dim)
    plain = resolve(head_dim=head_dim)

    inv_freq, base = spec.frequencies(1)[0].astype(float), plain.frequencies(1)[0].astype(float)
    raised = resolve(head_dim=head_dim, rope_theta=10000.0 * factor ** (head_dim / (head_dim - 2)))

    assert inv_freq[0] == 1
    assert base[-1] / inv_freq[-1] == pytest.approx(factor, rel=2.1 * UNIT)  # each is rounded once
    np.testing.assert_array_equal(inv_freq, raised.frequencies(1)[0])


def test_the_first_name_of_longrope_still_means_it():
    scaling = {"long_factor": [4.0] * 32, "short_factor": [1.0] * 32, "original_max_position_embeddings": 512}

    assert resolve({"type": "su", **scaling}) == resolve({"type": "longrope", **scaling})


def test_old_and_new_style_files_say_the_same():
    old = config({"type": "linear", "factor": 4.0}, rope_theta=5e5)
    new = config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
    del new["rope_theta"], new["rope_scaling"]

    assert resolve_rope(old, RopeSettings(), 0) == resolve_rope(new, RopeSettings(), 0)


GEMMA = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 256}


def test_gemma_3_turns_its_sliding_layers_by_their_own_theta():
    specs = resolve_rope({**GEMMA, "max_position_embeddings": 32768}, RopeSettings(), 0)

    assert {name: spec.theta for name, spec in specs.items()} == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert {spec.window for spec in specs.values()} == {32768}


def test_what_a_file_leaves_to_the_models_class_is_taken_from_there():
    nested = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}
    nested["text_config"]["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}  # as Gemma 3 4B has it, and no more
    gemma = resolve_rope(nested, RopeSettings(), 0)
    phi = resolve_rope({"model_type": "phi", "hidden_size": 256, "num_attention_heads": 4}, RopeSettings(), 0)

    full = gemma["full_attention"]
    assert (full.kind, full.factor, full.head_dim, full.window) == ("linear", 8.0, 256, 131072)
    assert full.trained_len == 131072 / 8
    assert gemma["sliding_attention"].kind == "none"
    assert (phi["default"].rotary_dim, phi["default"].head_dim) == (32, 64)


def test_an_override_leaves_sliding_layers_as_they_are():
    wanted = RopeSettings(kind="linear", factor=4.0, theta=2e6)
    specs = resolve_rope({**GEMMA, "max_position_embeddings": 32768}, wanted, 0)

    full, sliding = specs["full_attention"], specs["sliding_attention"]
    assert (full.kind, full.factor, full.theta, full.window) == ("linear", 4.0, 2e6, 131072)
    assert (sliding.kind, sliding.theta, sliding.window) == ("none", 1e4, 131072)


def test_an_override_of_another_kind_forgets_the_files_scaling_and_one_of_the_same_keeps_the_rest():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 20}

    other = resolve(yarn, wanted={"kind": "linear", "factor": 2.0})
    same = resolve(yarn, wanted={"kind": "yarn", "factor": 8.0})
    off = resolve(yarn, wanted={"kind": "none"})

    assert (other.kind, other.factor, other.trained_len, other.window) == ("linear", 2.0, 1024, 2048)
    assert (same.beta_fast, same.factor, same.window) == (20, 8.0, 8192)
    assert same.attention_factor == pytest.approx(0.1 * math.log(8) + 1)
    assert (off.kind, off.factor, off.window, off.attention_factor) == ("none", 1.0, 1024, 1.0)


def test_compressing_positions_by_eight_is_the_same_as_positions_an_eighth_as_large():
    scaled, plain = resolve(wanted={"kind": "linear", "factor": 8.0}), resolve()

    np.testing.assert_array_equal(scaled.frequencies(1)[0] * np.float32(8), plain.frequencies(1)[0])


@pytest.mark.parametrize(
    ("wanted", "asked", "window"),
    [
        ({}, 0, 4096),
        ({}, 1000, 1000),
        ({"theta": 1e6}, 0, 4096),
        ({"kind": "linear", "factor": 8.0}, 0, 32768),
        ({"kind": "ntk", "factor": 2.5}, 0, 10240),
        ({"kind": "yarn", "factor": 4.0}, 9000, 9000),
        ({"kind": "dynamic", "factor": 4.0}, 0, 16384),
        ({"kind": "llama3", "factor": 8.0}, 0, 32768),
        ({"kind": "yarn", "factor": 4.0, "original_len": 2048}, 0, 8192),
    ],
)
def test_the_served_window_is_the_one_asked_for_or_what_the_scaling_reaches(
    wanted: dict[str, Any], asked: int, window: int
):
    assert resolve(window=asked, wanted=wanted).window == window


def test_the_line_at_start_names_kind_factor_and_both_windows():
    line = resolve(wanted={"kind": "linear", "factor": 8.0}).describe()

    assert line == "rope: linear scaling by 8, theta 10000, trained window 4096 tokens, served window 32768"


def test_a_model_without_rope_has_no_specs_and_no_override():
    raw = {"model_type": "gpt2"}

    assert resolve_rope(raw, RopeSettings(), 0) == {}
    with pytest.raises(BackendError, match="'gpt2' has no RoPE"):
        resolve_rope(raw, RopeSettings(theta=1e6), 0)


NAN, LISTS = float("nan"), {"long_factor": [1.0] * 32, "short_factor": [1.0] * 32}


@pytest.mark.parametrize(
    ("old", "new"),
    [("linear", "linear"), (None, "linear"), ("linear", None), ("su", "longrope"), ("longrope", "su")],
)
def test_two_names_of_one_kind_are_taken(old: str | None, new: str | None):
    lists = {"long_factor": [2.0] * 32, "short_factor": [1.0] * 32} if "linear" not in (old, new) else {}
    both = resolve({"type": old, "rope_type": new, "factor": 4.0, **lists})
    assert both == resolve({"rope_type": new or old, "factor": 4.0, **lists})


def test_a_kind_of_several_axes_is_the_plain_one_for_text():
    assert resolve({"type": "mrope", "rope_type": "default"}) == resolve()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling.rope_type is 'spiral'; known are default, linear"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling.rope_type is 3"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.type is 'linear' and rope_scaling.rope_type is 'yarn'; they must name the same kind",
        ),
        ({"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 4.0}}, "rope_scaling.type is 'default'"),
        (
            {"rope_scaling": {"type": "dynamic", "rope_type": "default", "factor": 4.0}},
            "rope_scaling.type is 'dynamic'",
        ),
        ({"rope_scaling": {"type": "spiral", "rope_type": "linear", "factor": 4.0}}, "rope_scaling.type is 'spiral'"),
        ({"rope_scaling": {"type": 3, "rope_type": "linear", "factor": 4.0}}, "rope_scaling.type is 3"),
        (
            {"rope_parameters": {"full_attention": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}},
            "rope_parameters.full_attention.type is 'yarn'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; 'linear' needs it"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0; it must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling.factor is -2.0; it must be"),
        ({"rope_scaling": {"type": "linear", "factor": NAN}}, "rope_scaling.factor is nan; it must be"),
        ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "rope_scaling.factor is inf; it must be"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "rope_scaling.factor is '8'; it must be"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor is True; it must be"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
            "rope_scaling.factor is 0.5; 'dynamic' needs at least 1",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing; 'yarn' needs it, or original"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]; it must be an object or null"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling.low_freq_factor is 4.0; it must be less"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "rope_scaling.high_freq_factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 40}}, "rope_scaling.beta_slow is 40; it must"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.short_factor is missing"),
        (
            {"rope_scaling": {"type": "longrope", **LISTS, "long_factor": [1.0] * 31, "factor": 2.0}},
            "rope_scaling.long_factor has 31 numbers; 64 rotated values a head need 32",
        ),
        (
            {"rope_scaling": {"type": "longrope", **LISTS, "short_factor": [0.0] * 32}},
            "rope_scaling.short_factor must be a list of positive numbers",
        ),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number above 1"),
        ({"rope_theta": -1e4}, "rope_theta is -10000.0; it must be"),
        ({"rope_theta": NAN}, "rope_theta is nan; it must be"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_parameters.rope_theta is 0.0"),
        ({"head_dim": 65}, "RoPE requires an even rotary dimension, but got `head_dim`=65"),
        ({"partial_rotary_factor": 0.1, "head_dim": 50}, "partial_rotary_factor 0.1 of head_dim 50 rotates 5 values"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it must be a number above 0 and at most 1"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'; it must be a number of at least 2"),
        ({"model_type": "no-such"}, "model_type is 'no-such', which the installed transformers doesn't know"),
    ],
)
def test_what_cannot_be_is_named_with_file_and_field_in_one_line(fields: dict[str, Any], message: str):
    with pytest.raises(BackendError) as caught:
        resolve_rope(config() | fields, RopeSettings(), 0)

    assert str(caught.value).startswith(f"config.json: {message}")
    assert "\n" not in str(caught.value)


NAMES = ["type", "rope_type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "truncate"]
FIELDS = ["rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "head_dim", "hidden_size"]
FIELDS += ["num_attention_heads", "max_position_embeddings", "layer_types", "text_config", "rotary_pct"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.sampled_from(["yarn", "linear", "su", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*NAMES, "full_attention", "sliding_attention"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(["llama", "gemma3_text", "phi3", "gpt_neox", "gpt2"]),
    st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4),
    st.sampled_from([RopeSettings(), RopeSettings(kind="ntk", factor=2.0)]),
)
def test_any_json_gives_finite_frequencies_or_one_line(model_type: str, fields: dict[str, Any], wanted: RopeSettings):
    refusal = ""
    try:
        specs = resolve_rope({"model_type": model_type, **fields}, wanted, 0)
    except BackendError as error:
        specs, refusal = {}, str(error)

    assert len(refusal.splitlines()) <= 1
    for spec in specs.values():
        inv_freq, attention_factor = spec.frequencies(5000)
        assert np.isfinite(inv_freq).all()
        assert attention_factor > 0
        assert spec.window > 0


def test_dynamic_scaling_without_a_factor_is_by_as_much_as_a_chat_is_longer_than_the_trained_window():
    alone = resolve(window=16_384, wanted={"kind": "dynamic"})

    assert alone == resolve(window=16_384, wanted={"kind": "dynamic", "factor": 1.0})
    assert alone.factor == 1
    np.testing.assert_array_equal(alone.frequencies(alone.trained_len)[0], resolve().frequencies(1)[0])
    longer = resolve(wanted={"kind": "ntk", "factor": 4.0}).frequencies(1)[0]
    np.testing.assert_allclose(alone.frequencies(4 * alone.trained_len)[0], longer, rtol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kind": "linear"}, "'linear' needs a factor"),
        ({"kind": "longrope", "factor": 4.0}, "'longrope' needs short_factor and long_factor, and this config.json"),
        ({"factor": 4.0}, "a RoPE factor needs a kind"),
        ({"kind": "none", "factor": 4.0}, "a RoPE factor needs a kind"),
        ({"kind": "yarn", "factor": 0.5}, "factor of 0.5 is too small: 'yarn' needs at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(wanted: dict[str, Any], message: str):
    with pytest.raises(BackendError, match=message) as caught:
        resolve(wanted=wanted)

    assert "\n" not in str(caught.value)
