"""What the TGI routes take, what they refuse and in which words, and what the engine is asked for."""

from dataclasses import replace

import pytest
from fake_api import api, events

from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import (
    GenerateRequest,
    Grammar,
    Guidance,
    LogprobRequest,
    ModelInfo,
    StopRules,
)
from tightrope.server.dialects.tgi.reading import TGILimits, generate_asked, is_sampled, reword
from tightrope.server.dialects.tgi.requests import GenerateBody, Parameters
from tightrope.server.http.body import ignored_fields
from tightrope.server.served import Served

pytestmark = pytest.mark.quick

INFO = ModelInfo("m", "rules", "fake", 259, 1024, 1024, 4096, "f16", 8, "<s>", "</s>", (), None, ())
SERVED = Served("m", INFO, LimitSettings(), max_prompts=4)
LIMITS = TGILimits(
    max_best_of=2, max_stop_sequences=4, max_top_n_tokens=5, max_input_tokens=1023, max_total_tokens=1024
)


def ask(
    inputs: str = "hi", *, is_stream: bool = False, limits: TGILimits = LIMITS, **parameters: object
) -> GenerateRequest:
    return asked_of(GenerateBody.model_validate({"inputs": inputs, "parameters": parameters}), limits, is_stream)


def asked_of(body: GenerateBody, limits: TGILimits = LIMITS, is_stream: bool = False) -> GenerateRequest:
    (request,) = generate_asked(body, limits, SERVED, is_stream=is_stream).requests
    return request


def test_a_watermark_is_as_strong_as_the_server_is_told():
    told = replace(LIMITS, watermark_gamma=0.25, watermark_delta=3.5)

    assert ask(watermark=True).sampling.watermark_delta == 2.0
    assert ask().sampling.watermark_delta == 0.0
    marked = ask(watermark=True, limits=told).sampling
    assert (marked.watermark_gamma, marked.watermark_delta) == (0.25, 3.5)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": -0.5}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": -1}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 1023. Given: 0"),
        ({"truncate": 1024}, "`truncate` must be strictly positive and less than 1023. Given: 1024"),
        ({"grammar": {"type": "regex"}}, "grammar is not valid: Grammar must have a 'value' field"),
        ({"grammar": {"type": "json", "value": {}}}, "grammar is not valid: Grammar must have a 'properties' field"),
        (
            {"grammar": {"type": "json", "value": "{"}},
            "grammar is not valid: the schema is no JSON: Input data was truncated",
        ),
        (
            {"grammar": {"type": "xml", "value": "a"}},
            "grammar is not valid: its type must be json, json_object, json_schema or regex, not 'xml'",
        ),
        ({"adapter_id": "x"}, "adapter_id: no adapter 'x' is loaded"),
    ],
)
def test_values_out_of_range_are_refused_in_tgis_words(parameters: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**parameters)
    assert caught.value.message == text


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_tgis_words(parameters: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(is_stream=True, **parameters)
    assert caught.value.message == text


def test_empty_stop_sequences_and_nulls_neither_count_nor_stop() -> None:
    assert ask(stop=["", None]).stop.strings == ask().stop.strings
    assert [*ask(stop=["a", "", "b", None, "c", "", "d"]).stop.strings] == [*"abcd"]


def test_a_server_with_one_answer_says_so() -> None:
    one = TGILimits(1, 4, 5, 1023, 1024)
    with pytest.raises(InvalidRequest, match=r"^`best_of` != 1 is not allowed for this endpoint$"):
        ask(limits=one, best_of=2, do_sample=True)


def test_the_first_check_in_tgis_order_is_the_one_reported() -> None:
    wrong: dict[str, object] = {
        "best_of": 3,
        "temperature": 0,
        "repetition_penalty": 0,
        "frequency_penalty": 3,
        "top_p": 0,
        "typical_p": 0,
        "top_k": 0,
        "max_new_tokens": 0,
        "stop": list("abcde"),
        "top_n_tokens": 6,
        "truncate": 0,
        "grammar": {"type": "regex"},
    }
    reported = []
    while wrong:
        with pytest.raises(InvalidRequest) as caught:
            ask(inputs="hi", **wrong)
        reported.append(caught.value.param)
        del wrong[str(caught.value.param)]
    assert reported == [
        "best_of",
        "temperature",
        "repetition_penalty",
        "frequency_penalty",
        "top_p",
        "typical_p",
        "top_k",
        "max_new_tokens",
        "stop",
        "top_n_tokens",
        "truncate",
        "grammar",
    ]


def test_empty_inputs_are_found_after_the_ranges_and_before_truncate() -> None:
    with pytest.raises(InvalidRequest, match="top_n_tokens"):
        ask("", top_n_tokens=6)
    with pytest.raises(InvalidRequest, match=r"^`inputs` cannot be empty$"):
        ask("", truncate=0)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, True),
        ({}, False),
        ({"do_sample": True}, True),
        ({"do_sample": False, "temperature": 0.5}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"mirostat_mode": 2}, True),
        ({"dynatemp_low": 0.5, "dynatemp_high": 1.5}, True),
        ({"min_p": 0, "tfs": 1, "xtc_probability": 0, "dry_multiplier": 0.8}, False),
        ({"repetition_penalty": 1.2, "seed": 3}, False),
    ],
)
def test_tokens_are_drawn_if_anything_asks_for_it(parameters: dict[str, object] | None, expected: bool) -> None:
    made = None if parameters is None else Parameters.model_validate(parameters)
    assert is_sampled(made) is expected
    asked = asked_of(GenerateBody(inputs="hi", parameters=made))
    assert (asked.sampling.temperature > 0) is expected


def test_parameters_reach_the_engine() -> None:
    asked = ask(
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        typical_p=0.8,
        repetition_penalty=1.15,
        frequency_penalty=0.5,
        seed=2**64 - 1,
        max_new_tokens=5000,
        stop=["x"],
        truncate=7,
    )
    assert asked.sampling == SamplingParams(
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        typical_p=0.8,
        repetition_penalty=1.15,
        relative_frequency_penalty=0.5,
        seed=2**64 - 1,
    )
    assert asked.stop == StopRules(max_tokens=5000, strings=("x",), keep_stop_text=True, length_first=True)
    assert (asked.truncate_to, asked.reserve_tokens) == (7, 1024)
    assert asked.logprobs is None


@pytest.mark.parametrize(
    ("parameters", "is_stream", "expected"),
    [
        ({"details": True}, False, LogprobRequest(processed=True)),
        ({"decoder_input_details": True}, False, LogprobRequest(processed=True)),
        ({"best_of": 2, "do_sample": True}, False, LogprobRequest(processed=True)),
        ({"top_n_tokens": 3}, True, LogprobRequest(processed=True, top=3)),
        ({}, True, LogprobRequest(processed=True)),
    ],
)
def test_logprobs_are_computed_only_where_somebody_sees_them(
    parameters: dict[str, object], is_stream: bool, expected: LogprobRequest
) -> None:
    assert ask(is_stream=is_stream, **parameters).logprobs == expected


def test_unknown_keys_change_nothing_wherever_they_stand() -> None:
    body = GenerateBody.model_validate({"inputs": "hi", "mood": 1, "parameters": {"mood": 2, "best_of": 1, "seed": 3}})
    asked = asked_of(body, is_stream=True)
    assert asked.sampling == ask(seed=3).sampling
    assert sorted(ignored_fields(body)) == ["mood", "parameters.mood"]


def test_null_means_absent_in_every_parameter() -> None:
    nulls = ask(**dict.fromkeys(Parameters.model_fields))
    assert nulls.sampling == ask().sampling
    assert nulls.stop == ask().stop


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        (
            2000,
            None,
            "`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 2000 `inputs` tokens and 0 `max_new_tokens`",
        ),
        (1024, None, "`inputs` must have less than 1023 tokens. Given: 1024"),
        (
            1000,
            30,
            "`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 1000 `inputs` tokens and 30 `max_new_tokens`",
        ),
    ],
)
def test_lengths_are_refused_in_tgis_words(prompt: int, new: int | None, text: str) -> None:
    error = ContextLengthExceeded(prompt, new or 1, 1024)
    reword(error, new)
    assert (error.message, error.param) == (text, "inputs")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        (b"{", 400, "Failed to parse the request body as JSON: "),
        (b"", 400, "Failed to parse the request body as JSON: "),
        (b'{"inputs": "a", "parameters": {"top_p": NaN}}', 400, "Failed to parse the request body as JSON: "),
        (b"{}", 422, "Failed to deserialize the JSON body into the target type: inputs: field required"),
        (b'{"inputs": 7}', 422, "Failed to deserialize the JSON body into the target type: inputs: "),
        (b'{"inputs": null}', 422, "Failed to deserialize the JSON body into the target type: inputs: "),
        (
            b'{"inputs": "a", "parameters": {"max_new_tokens": "5"}}',
            422,
            "Failed to deserialize the JSON body into the target type: parameters.max_new_tokens: ",
        ),
        (
            b'{"inputs": "a", "parameters": {"max_new_tokens": -1}}',
            422,
            "Failed to deserialize the JSON body into the target type: parameters.max_new_tokens: ",
        ),
        (
            b'{"inputs": "a", "parameters": {"stop": "x"}}',
            422,
            "Failed to deserialize the JSON body into the target type: parameters.stop: ",
        ),
    ],
)
async def test_bodies_of_another_shape_are_told_in_plain_text(
    path: str, content: bytes, status: int, text: str
) -> None:
    async with api() as http:
        reply = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.text.startswith(text)


REFUSED = {
    "top_p": "Input validation error: `top_p` must be > 0.0 and < 1.0",
    "length": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1024. "
    "Given: 2001 `inputs` tokens and 9 `max_new_tokens`",
}
BODIES = {
    "top_p": {"inputs": "a", "parameters": {"top_p": 1.0}},
    "length": {"inputs": "x" * 2000, "parameters": {"max_new_tokens": 9}},
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_are_422_with_their_kind_and_of_a_stream_an_event_under_200(name: str) -> None:
    told = {"error": REFUSED[name], "error_type": "validation"}
    async with api() as http:
        for path in ("/generate", "/"):
            reply = await http.post(path, json=BODIES[name])
            assert (reply.status_code, reply.json()) == (422, told)
        for path in ("/generate_stream", "/"):
            reply = await http.post(path, json=BODIES[name] | {"stream": True})
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert events(reply.text) == [told]
        assert 'tgi_request_failure{err="validation"} 4' in (await http.get("/metrics")).text


async def test_the_number_counted_against_the_window_is_at_most_1024() -> None:
    async with api(limits={"max_best_of": 2}) as http:
        parameters = {"max_new_tokens": 4_000_000_000, "stop": ["e"]}
        reply = await http.post("/generate", json={"inputs": "a?", "parameters": parameters})
        assert reply.status_code == 422, "a window of 1024 has no room for 1024 new ones"
        del parameters["max_new_tokens"]
        reply = await http.post("/generate", json={"inputs": "a?", "parameters": parameters})
        assert reply.json() == {"generated_text": "fine"}


async def test_another_content_type_is_told_in_tgis_words() -> None:
    async with api() as http:
        reply = await http.post("/generate", content=b"{}", headers={"content-type": "text/plain"})
    assert (reply.status_code, reply.text) == (415, "Expected request with `Content-Type: application/json`")


def test_sampling_fields_of_other_dialects_are_taken_beside_tgis_own() -> None:
    asked = ask(min_p=0.1, dry_multiplier=0.8, banned_strings=["x"], negative_prompt="rude", cfg_scale=2, n_predict=7)
    assert asked.sampling == SamplingParams(min_p=0.1, dry_multiplier=0.8, banned_strings=("x",))
    assert asked.guidance == Guidance("rude", 2)
    assert asked.stop.max_tokens == asked.reserve_tokens == 7


def test_a_grammar_comes_under_any_name_and_two_must_agree() -> None:
    regex = {"type": "regex", "value": "a+"}
    assert ask(guided_regex="a+").grammar == Grammar("regex", "a+", "guided_regex")
    assert ask(guided_regex="a+", grammar=regex).grammar == Grammar("regex", "a+", "grammar")
    with pytest.raises(InvalidRequest, match="guided_regex: grammar asks for another shape"):
        ask(guided_regex="b+", grammar=regex)
