"""Every name that clients send for sampling: what it means, what is refused, and what is listed."""

from typing import Any

import pytest
from request_fields import value_of

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.steps import SAMPLER_ORDER, SamplingParams
from tightrope.engine.types import Guidance, StopRules
from tightrope.server.fields.names import KNOWN, NUMBERS, OTHER_NUMBERS, WITHOUT_EFFECT
from tightrope.server.fields.numbers import INTERVALS, Number
from tightrope.server.fields.sampling import read_sampling

pytestmark = pytest.mark.quick

V = 1000

# What SillyTavern sends each time when the user has touched nothing, of all its types together.
NEUTRAL: dict[str, Any] = {
    "temperature": 1,
    "top_p": 1,
    "typical_p": 1,
    "typical": 1,
    "min_p": 0,
    "top_k": 0,
    "top_a": 0,
    "tfs": 1,
    "tfs_z": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "skew": 0,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "mirostat_mode": 0,
    "mirostat": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 0,
    "dry_sequence_breakers": '["\\n",":","\\"","*"]',
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "nsigma": 0,
    "top_n_sigma": 0,
    "min_keep": 0,
    "adaptive_target": -0.01,
    "adaptive_decay": 0.9,
    "repetition_penalty": 1,
    "rep_pen": 1,
    "repeat_penalty": 1,
    "rep_pen_range": 0,
    "repetition_penalty_range": 0,
    "repeat_last_n": 0,
    "rep_pen_slope": 1,
    "repetition_decay": 0,
    "encoder_repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": 0,
    "num_beams": 1,
    "length_penalty": 1,
    "early_stopping": False,
    "do_sample": True,
    "guidance_scale": 1,
    "negative_prompt": "",
    "custom_token_bans": "",
    "banned_strings": [],
    "logit_bias": {},
    "seed": -1,
    "sampler_seed": -1,
    "min_tokens": 0,
    "min_length": 0,
    "max_tokens_second": 0,
    "ban_eos_token": False,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "speculative_ngram": False,
    "temperature_last": False,
}


def params(**fields: object) -> SamplingParams:
    return read_sampling(fields, V).params


def test_neutral_values_do_nothing_and_none_is_listed() -> None:
    read = read_sampling(NEUTRAL, V, max_tokens=16)
    assert read.params == SamplingParams()
    assert read.stop == StopRules(max_tokens=16)
    assert read.ignored == ()
    assert NEUTRAL.keys() <= KNOWN


def test_null_is_absent_and_unknown_names_are_left_alone() -> None:
    read = read_sampling({**dict.fromkeys(KNOWN), "mood": "good", "prompt": [1]}, V)
    assert (read.params, read.stop, read.ignored) == (SamplingParams(), StopRules(), ())


def test_every_number_of_the_sampler_has_names_under_which_clients_send_it() -> None:
    of_tgi = {"relative_frequency_penalty", "watermark_gamma", "watermark_delta"}
    assert {number.target for number in (*NUMBERS, *OTHER_NUMBERS)} >= INTERVALS.keys() - of_tgi


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.target)
def test_each_name_of_a_value_means_the_same(number: Number) -> None:
    switch = {} if number.part_of is None else {number.part_of: 1}
    interval = number.interval
    read = {repr(params(**{name: value_of(number), **switch})) for name in number.names}
    assert len(read) == 1
    assert read != {repr(params(**switch))}
    for name in number.names:
        for wrong in ("1", True, [1], interval.low - 2, interval.high + 1):
            if wrong in (-float("inf"), float("inf")):
                wrong = 10**400
            with pytest.raises(InvalidRequest) as caught:
                params(**{name: wrong, **switch})
            assert caught.value.param == name
            assert name in caught.value.message
            assert "\n" not in caught.value.message


def test_the_parts_of_a_sampler_that_is_off_are_not_even_read() -> None:
    assert params(mirostat_tau=0, mirostat_eta=0, dry_base=-1, xtc_threshold=7, smoothing_curve=0) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": -1}, {}),
        ({"top_k": 10**6}, {"top_k": V}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"repeat_last_n": -1}, {}),
        ({"rep_pen": 1.1, "rep_pen_range": 1024}, {"repetition_penalty": 1.1, "penalty_range": 1024}),
        ({"epsilon_cutoff": 3, "eta_cutoff": 20}, {"epsilon_cutoff": 3 * 1e-4, "eta_cutoff": 20 * 1e-4}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        (
            {"temperature": 1, "dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5},
            {"dynatemp_range": 0.5},
        ),
        (
            {"dynatemp_min": 0.5, "dynatemp_max": 2.0, "dynatemp_exponent": 2},
            {"temperature": 1.25, "dynatemp_range": 0.75, "dynatemp_exponent": 2},
        ),
        ({"dynatemp_range": 0.5, "temperature": 2}, {"temperature": 2, "dynatemp_range": 0.5}),
        ({"dynatemp_low": 0.5, "dynatemp_high": 2, "dynamic_temperature": False}, {}),
        ({"rep_pen_range": 64, "repetition_decay": 32}, {"penalty_range": 64, "repetition_decay": 32}),
        ({"adaptive_target": 0, "adaptive_decay": 0.5}, {"adaptive_target": 0, "adaptive_decay": 0.5}),
        ({"adaptive_target": -1, "adaptive_decay": 7}, {}),
        ({"adaptive_target": 0.4, "samplers": ["adaptive_p"]}, {"adaptive_target": 0.4}),
        ({"skew": -0.5}, {"skew": -0.5}),
        ({"custom_token_bans": "1,2, 3"}, {"banned_tokens": (1, 2, 3)}),
        ({"custom_token_bans": [4, 4]}, {"banned_tokens": (4,)}),
        ({"banned_strings": ["a", "", "a"]}, {"banned_strings": ("a",)}),
        ({"banned_strings": '["a, b"]'}, {"banned_strings": ("a, b",)}),
        ({"logit_bias": {"3": 2, "4": -100}}, {"logit_bias": {3: 2, 4: -100}}),
        ({"logit_bias": [[3, 2], [4, False]]}, {"logit_bias": {3: 2}, "banned_tokens": (4,)}),
        (
            {"dry_multiplier": 0.8, "dry_sequence_breakers": '["\\n", ":"]'},
            {"dry_multiplier": 0.8, "dry_sequence_breakers": ("\n", ":")},
        ),
        (
            {"dry_multiplier": 0.8, "dry_sequence_breakers": ["x"], "dry_penalty_last_n": 50},
            {"dry_multiplier": 0.8, "dry_sequence_breakers": ("x",), "dry_range": 50},
        ),
        (
            {"dry_multiplier": 0.8, "dry_sequence_breakers": "a,b"},
            {"dry_multiplier": 0.8, "dry_sequence_breakers": ("a", "b")},
        ),
    ],
)
def test_values_are_turned_into_the_engines(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert params(**fields) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("fields", "order"),
    [
        ({"temperature_last": True}, (*SAMPLER_ORDER[1:], "temperature")),
        (
            {"sampler_priority": ["dry", "quadratic_sampling", "min_p", "dynamic_temperature"]},
            ("smoothing", "min_p", "temperature"),
        ),
        ({"sampler_priority": "min_p\ntemperature"}, ("min_p", "temperature")),
        (
            {"sampler_order": [6, 0, 1, 3, 4, 2, 5]},
            ("top_k", "top_a", "tfs", "typical_p", "top_p", "min_p", "temperature"),
        ),
        (
            {"samplers": ["penalties", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]},
            ("top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"),
        ),
        ({"sampler_priority": ["temperature", "smoothing", "top_n_sigma", "top_k"]}, ()),
    ],
)
def test_orders_of_all_dialects_become_one_list(fields: dict[str, Any], order: tuple[str, ...]) -> None:
    assert params(**fields).order == order


def test_a_llama_cpp_list_switches_off_what_it_leaves_out() -> None:
    read = read_sampling({"samplers": ["top_k", "temperature"], "top_k": 5, "min_p": 0.1, "xtc_probability": 1}, V)
    assert read.params == SamplingParams(top_k=5, order=("top_k", "temperature"))
    assert read.ignored == (("min_p", "samplers leaves it out"), ("xtc_probability", "samplers leaves it out"))


def test_ids_outside_the_vocabulary_are_listed_and_do_no_harm() -> None:
    read = read_sampling({"logit_bias": {"5": 1, "1000": 2, "-1": 3}, "custom_token_bans": "7,29871"}, V)
    assert read.params == SamplingParams(logit_bias={5: 1}, banned_tokens=(7,))
    assert read.ignored == (
        ("logit_bias", "no token ids below 1000: 1000, -1"),
        ("custom_token_bans", "no token ids below 1000: 29871"),
    )


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"repetition_decay": 5}, "repetition_decay"),
        ({"adaptive_target": 0.5, "mirostat_mode": 2}, "adaptive_target"),
        ({"adaptive_target": 0.5, "samplers": ["top_k"]}, "adaptive_target"),
    ],
)
def test_a_value_that_others_leave_nothing_to_do_is_listed(fields: dict[str, Any], ignored: str) -> None:
    read = read_sampling(fields, V)
    assert [name for name, _ in read.ignored] == [ignored]
    assert (read.params.repetition_decay, read.params.adaptive_target) == (0, -1.0)


@pytest.mark.parametrize(
    ("fields", "guidance"),
    [
        ({"guidance_scale": 1.5, "negative_prompt": "be rude"}, Guidance("be rude", 1.5)),
        ({"cfg_scale": 0}, Guidance("", 0)),
        ({"guidance_scale": 1, "negative_prompt": ""}, None),
        ({"negative_prompt": ""}, None),
    ],
)
def test_guidance_needs_a_scale_that_changes_something(fields: dict[str, Any], guidance: Guidance | None) -> None:
    read = read_sampling(fields, V)
    assert (read.guidance, read.ignored) == (guidance, ())
    assert read_sampling({"negative_prompt": "rude"}, V).ignored == (("negative_prompt", "guidance_scale is 1"),)


def test_all_but_the_allowed_ids_are_banned() -> None:
    read = read_sampling({"allowed_token_ids": [5, 7, 29871], "custom_token_bans": "7"}, 9)
    assert sorted(read.params.banned_tokens) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert read.ignored == (("allowed_token_ids", "no token ids below 9: 29871"),)
    assert read_sampling({"allowed_tokens": []}, 9).params == SamplingParams()


def test_of_names_that_disagree_the_first_counts_and_the_others_are_listed() -> None:
    read = read_sampling({"seed": 3, "sampler_seed": 4, "typical": 0.5, "typical_p": 0.5}, V)
    assert (read.params.seed, read.params.typical_p) == (3, 0.5)
    assert read.ignored == (("sampler_seed", "seed came too, and counts"),)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_changes_nothing_is_listed_with_a_reason(name: str) -> None:
    ((listed, why),) = read_sampling({name: 0.7}, V).ignored
    assert listed == name
    assert why


def test_lists_under_several_names_all_count_and_empty_ones_hide_none() -> None:
    read = read_sampling(
        {
            "stop": [],
            "stopping_strings": ["a"],
            "stop_sequence": ["b"],
            "custom_token_bans": "",
            "banned_tokens": [3],
            "banned_strings": ["x"],
            "bad_words": ["y"],
            "allowed_token_ids": [1, 2, 3],
            "allowed_tokens": [2, 3],
        },
        5,
    )
    assert read.stop.strings == ("a", "b")
    assert read.params.banned_strings == ("x", "y")
    assert sorted(read.params.banned_tokens) == [0, 1, 3, 4]
    assert read.ignored == ()


def test_half_a_range_of_temperatures_is_listed() -> None:
    read = read_sampling({"dynatemp_low": 0.5, "temperature": 0.8}, V)
    assert (read.params, read.ignored) == (
        SamplingParams(temperature=0.8),
        (("dynatemp_low", "the other end of the range is missing"),),
    )
    both = {"dynatemp_low": 0.5, "dynatemp_high": 1.5}
    assert read_sampling(both | {"dynatemp_range": 0.5}, V).ignored == ()
    assert [name for name, _ in read_sampling(both | {"dynatemp_range": 0.7}, V).ignored] == ["dynatemp_range"]


def test_steps_that_there_are_not_are_listed() -> None:
    for name in ("samplers", "sampler_priority"):
        read = read_sampling({name: ["penalties", "dry", "top_k", "tempreature"]}, V)
        assert read.ignored == ((name, "there is no step 'tempreature'"),)


def test_llama_cpps_letters_are_a_list_of_steps() -> None:
    letters = read_sampling({"samplers": "kpt", "top_k": 5, "min_p": 0.1}, V)
    assert letters == read_sampling({"samplers": ["top_k", "top_p", "temperature"], "top_k": 5, "min_p": 0.1}, V)
    assert letters.params.order == ("top_k", "top_p", "temperature")


def test_a_length_up_to_the_window_goes_before_a_number() -> None:
    assert read_sampling({"auto_max_new_tokens": True, "max_tokens": 9}, V).stop.max_tokens is None
    assert read_sampling({"auto_max_new_tokens": False, "max_tokens": 9}, V).stop.max_tokens == 9


def test_stops_and_lengths_have_many_names_too() -> None:
    read = read_sampling(
        {"stopping_strings": ["a", "b", "a"], "max_new_tokens": 9, "min_length": 2, "ban_eos_token": True},
        V,
        max_tokens=16,
        more_stops=["c"],
    )
    assert read.stop == StopRules(max_tokens=9, min_tokens=2, strings=("a", "b", "c"), ignore_eos=True)
    assert read_sampling({"n_predict": -1}, V, max_tokens=16).stop == StopRules()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": "2"}, "guidance_scale"),
        ({"cfg_scale": 2, "negative_prompt": ["rude"]}, "negative_prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"logit_bias": "1"}, "logit_bias"),
        ({"custom_token_bans": "1,x"}, "custom_token_bans"),
        ({"custom_token_bans": 7}, "custom_token_bans"),
        ({"allowed_tokens": [29871]}, "allowed_tokens"),
        ({"allowed_token_ids": 5}, "allowed_token_ids"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling"),
        ({"rope_frequency_base": 1e9}, "rope_frequency_base"),
        ({"compress_pos_emb": 2}, "compress_pos_emb"),
        ({"banned_strings": [1]}, "banned_strings"),
        ({"banned_strings": "[1"}, "banned_strings"),
        ({"banned_strings": ["x" * 257]}, "banned_strings"),
        ({"banned_strings": [str(i) for i in range(1025)]}, "banned_strings"),
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["x" * 65]}, "dry_sequence_breakers"),
        ({"dry_multiplier": 1, "dry_sequence_breakers": [str(i) for i in range(16385)]}, "dry_sequence_breakers"),
        ({"dynatemp_low": 2, "dynatemp_high": 1}, "dynatemp_low"),
        ({"dynamic_temperature": 1}, "dynamic_temperature"),
        ({"adaptive_target": 1.1}, "adaptive_target"),
        ({"num_beams": 4}, "num_beams"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty"),
        ({"adaptive_target": 0.5, "adaptive_decay": 1}, "adaptive_decay"),
        ({"rep_pen_range": 9, "repetition_decay": -1}, "repetition_decay"),
        ({"sampler_order": [7]}, "sampler_order"),
        ({"sampler_priority": 3}, "sampler_priority"),
        ({"temperature_last": "yes"}, "temperature_last"),
        ({"stop_sequence": ["a", 1]}, "stop_sequence"),
        ({"stop": [str(i) for i in range(1025)]}, "stop"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_fields_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_sampling(fields, V)
    assert caught.value.param == param
    assert param in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200
