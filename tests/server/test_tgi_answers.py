"""What the TGI routes answer, to the key, whole and streamed."""

import re
from collections.abc import Sequence

import httpx
import pytest
from fake_api import api, events
from fakes import BOS, EOS, VOCAB_SIZE, script

from tightrope.backends.errors import BackendError

pytestmark = pytest.mark.quick

TEXT = "Grüße, 안녕 👩‍👩‍👧!"
TOKEN_KEYS = ["id", "text", "logprob", "special"]


async def ask(http: httpx.AsyncClient, path: str = "/generate", **parameters: object) -> httpx.Response:
    reply = await http.post(path, json={"inputs": "hi?", "parameters": parameters})
    assert reply.status_code == 200, reply.text
    return reply


async def test_without_details_the_answer_has_exactly_one_key() -> None:
    async with api(TEXT) as http:
        assert (await ask(http, best_of=1)).json() == {"generated_text": TEXT}


async def test_details_have_exactly_these_keys_and_tokens_that_add_up_to_the_text() -> None:
    async with api(TEXT) as http:
        answer = (await ask(http, details=True)).json()
    assert list(answer) == ["generated_text", "details"]
    details = answer["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert (details["finish_reason"], details["seed"], details["prefill"]) == ("eos_token", None, [])
    assert details["generated_tokens"] == len(details["tokens"]) == len(TEXT.encode()) + 1
    assert all(list(token) == TOKEN_KEYS for token in details["tokens"])
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == TEXT
    assert details["tokens"][-1] == details["tokens"][-1] | {"id": EOS, "text": "</s>", "special": True}


async def test_the_seed_that_was_drawn_is_told_and_a_given_one_too() -> None:
    async with api(TEXT) as http:
        assert (await ask(http, details=True, do_sample=True, seed=7)).json()["details"]["seed"] == 7
        drawn = (await ask(http, details=True, do_sample=True)).json()["details"]["seed"]
    assert 0 <= drawn < 2**64


async def test_decoder_input_details_list_the_prompt_and_turn_details_on() -> None:
    async with api() as http:
        details = (await ask(http, decoder_input_details=True)).json()["details"]
    assert [token["id"] for token in details["prefill"]] == [BOS, *b"hi?"]
    assert [list(token) for token in details["prefill"]] == [["id", "text", "logprob"]] * 4
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in details["prefill"][1:])


async def test_token_ids_are_listed_for_who_asks() -> None:
    async with api("abc") as http:
        answer = (await ask(http, return_token_ids=True)).json()
        streamed = events((await ask(http, "/generate_stream", return_token_ids=True)).text)
    assert answer == {"generated_text": "abc", "prompt_token_ids": [BOS, *b"hi?"], "token_ids": [*b"abc", EOS]}
    assert [event.get("prompt_token_ids") for event in streamed] == [[BOS, *b"hi?"], None, None, None]
    assert [event["token"]["id"] for event in streamed] == [*b"abc", EOS]


async def test_best_of_gives_one_answer_and_keeps_the_others_in_the_details() -> None:
    async with api("abc") as http:
        parameters = {"best_of": 3, "do_sample": True, "top_n_tokens": 1, "max_new_tokens": 2}
        details = (await ask(http, **parameters, details=True)).json()["details"]
        assert (await ask(http, **parameters)).json() == {"generated_text": "ab"}
    assert list(details)[-2:] == ["best_of_sequences", "top_tokens"]
    assert len(details["best_of_sequences"]) == 2
    for other in details["best_of_sequences"]:
        keys = ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]
        assert list(other) == keys
    seeds = {details["seed"], *(other["seed"] for other in details["best_of_sequences"])}
    assert len(seeds) == 3
    assert [len(tops) for tops in details["top_tokens"]] == [1, 1]
    assert list(details["top_tokens"][0][0]) == TOKEN_KEYS


@pytest.mark.parametrize(("stop", "kept"), [("한", "한"), ("b c", "b c"), ("zz", None)])
async def test_the_stop_text_stays_at_the_end_whole_and_streamed(stop: str, kept: str | None) -> None:
    text = "a한b cd"
    expected = text if kept is None else text[: text.index(kept) + len(kept)]
    async with api(text) as http:
        whole = (await ask(http, stop=[stop], details=True)).json()
        streamed = events((await ask(http, "/generate_stream", stop=[stop], details=True)).text)
    assert whole["generated_text"] == expected
    assert whole["details"]["finish_reason"] == ("eos_token" if kept is None else "stop_sequence")
    assert "".join(e["token"]["text"] for e in streamed if not e["token"]["special"]) == expected
    assert streamed[-1]["generated_text"] == expected


async def test_an_end_token_that_comes_last_counts_as_length() -> None:
    async with api(script("ab")) as http:
        details = (await ask(http, details=True, max_new_tokens=3)).json()["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 3)


async def test_a_stream_has_one_event_per_token_and_no_done() -> None:
    async with api("한a") as http:
        reply = await ask(http, "/generate_stream", details=True, top_n_tokens=1)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert (reply.headers["x-compute-type"], reply.headers["x-compute-characters"]) == ("cpu", "3")
    assert "[DONE]" not in reply.text
    *rest, last = events(reply.text)
    assert [event["index"] for event in (*rest, last)] == [1, 2, 3, 4, 5]
    for event in (*rest, last):
        assert list(event) == ["index", "token", "top_tokens", "generated_text", "details"]
        assert list(event["token"]) == TOKEN_KEYS
    assert all(event["generated_text"] is None and event["details"] is None for event in rest)
    assert [event["token"]["text"] for event in rest] == ["", "", "한", "a"]
    assert last["generated_text"] == "한a"
    assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 5, "seed": None, "input_length": 4}


async def test_a_stream_without_details_ends_with_null_details() -> None:
    async with api("a") as http:
        last = events((await ask(http, "/generate_stream")).text)[-1]
    assert list(last) == ["index", "token", "generated_text", "details"]
    assert last["details"] is None


async def test_a_failure_is_424_whole_and_one_error_event_in_a_stream() -> None:
    def breaks(token_ids: Sequence[int]) -> int:
        if len(token_ids) > 6:
            raise BackendError("the model broke")
        return ord("a")

    error = {"error": "Request failed during generation: the model broke", "error_type": "generation"}
    async with api(breaks) as http:
        reply = await http.post("/generate", json={"inputs": "abc?"})
        assert (reply.status_code, reply.json()) == (424, error)
        *pieces, last = events((await ask(http, "/generate_stream")).text)
    assert ["".join(piece["token"]["text"] for piece in pieces), last] == ["aaa", error]


async def test_the_root_answers_a_list_with_the_full_text_unless_told_otherwise() -> None:
    async with api("a") as http:
        assert (await ask(http, "/")).json() == [{"generated_text": "hi?a"}]
        assert (await ask(http, "/", return_full_text=False)).json() == [{"generated_text": "a"}]
        assert (await ask(http, return_full_text=True)).json() == {"generated_text": "hi?a"}
        reply = await http.post("/", json={"inputs": "hi?", "stream": True})
        assert events(reply.text)[-1]["generated_text"] == "hi?a"


async def test_headers_tell_times_and_counts_in_whole_numbers() -> None:
    async with api("abc") as http:
        reply = await http.post("/generate", json={"inputs": "안녕?"})
    assert reply.headers["x-compute-characters"] == "3"
    assert reply.headers["x-prompt-tokens"] == "8"
    assert reply.headers["x-generated-tokens"] == "4"
    assert float(reply.headers["x-compute-time"]) > 0
    for name in ("total", "validation", "queue", "inference"):
        assert reply.headers[f"x-{name}-time"].isdecimal()
    assert reply.headers["x-time-per-token"].isdecimal()


async def test_truncate_keeps_the_end_of_the_input() -> None:
    async with api("abc") as http:
        reply = await http.post("/generate", json={"inputs": "x" * 5000 + "?", "parameters": {"truncate": 3}})
    assert reply.json() == {"generated_text": "abc"}
    assert reply.headers["x-prompt-tokens"] == "3"


async def test_info_tells_the_limits() -> None:
    async with api(limits={"max_best_of": 3}) as http:
        info = (await http.get("/info")).json()
    assert info["model_sha"] is None
    assert (info["max_best_of"], info["max_total_tokens"]) == (3, 1024)
    assert info["max_input_tokens"] == info["max_input_length"] == 1023
    told = "model_id model_sha model_pipeline_tag max_concurrent_requests max_best_of max_stop_sequences "
    told += "max_input_tokens max_total_tokens validation_workers max_client_batch_size router version sha docker_label"
    assert {*told.split(), "model_dtype", "model_device_type", "max_batch_total_tokens"} <= info.keys()


async def test_a_bound_of_prompts_is_told_and_kept_in_tgis_words() -> None:
    async with api(limits={"max_input_tokens": 10}) as http:
        info = (await http.get("/info")).json()
        taken = await http.post("/generate", json={"inputs": "x" * 8 + "?"})
        refused = await http.post("/generate", json={"inputs": "x" * 9 + "?"})
        cut = await http.post("/generate", json={"inputs": "x" * 9 + "?", "parameters": {"truncate": 10}})
        long = await http.post("/generate", json={"inputs": "?", "parameters": {"truncate": 11}})
        chat = await http.post("/v1/completions", json={"prompt": "x" * 9 + "?"})
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (10, 1024)
    assert (taken.status_code, cut.status_code) == (200, 200)
    text = "Input validation error: `inputs` must have less than 10 tokens. Given: 11"
    assert (refused.status_code, refused.json()) == (422, {"error": text, "error_type": "validation"})
    assert "`truncate` must be strictly positive and less than 10. Given: 11" in long.json()["error"]
    assert (chat.status_code, chat.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
async def test_a_healthy_server_answers_with_an_empty_body(path: str) -> None:
    async with api() as http:
        reply = await http.get(path)
    assert (reply.status_code, reply.content) == (200, b"")


async def test_tokens_are_listed_with_their_places_in_bytes() -> None:
    async with api() as http:
        body = {"inputs": "é!", "parameters": {"top_p": 1.0, "stop": list("abcdef")}, "note": 1}
        places = (await http.post("/tokenize", json=body)).json()
    assert places[0] == {"id": BOS, "text": "", "start": 0, "stop": 0}
    assert [(place["start"], place["stop"]) for place in places[1:]] == [(0, 1), (1, 2), (2, 3)]
    assert places[-1] == {"id": ord("!"), "text": "!", "start": 2, "stop": 3}


@pytest.mark.plain
async def test_one_tokenize_path_serves_four_dialects() -> None:
    async with api(chat_template="{{ messages[0].content }}?") as http:
        text = (await http.post("/tokenize", json={"prompt": "a", "return_token_strs": True})).json()
        assert text == {"count": 2, "max_model_len": 1024, "tokens": [BOS, 97], "token_strs": ["<s>", "a"]}
        bare = (await http.post("/v1/tokenize", json={"prompt": "a", "add_special_tokens": False})).json()
        assert bare["tokens"] == [97]
        chat = (await http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})).json()
        assert chat["tokens"] == [BOS, 97, 63]
        asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert (await http.post("/v1/chat/completions", json=asked)).json()["usage"]["prompt_tokens"] == chat["count"]
        assert (await http.post("/tokenize", json={"content": "a"})).json() == {"tokens": [97]}
        assert (await http.post("/detokenize", json={"tokens": [BOS, 97]})).json()["prompt"] == "<s>a"
        reply = await http.post("/tokenize", json={"nothing": 1})
        assert (reply.status_code, reply.headers["content-type"]) == (400, "application/json")
        reply = await http.post("/tokenize", json={"prompt": "a", "add_special_tokens": 1})
        assert reply.json()["error"]["param"] == "add_special_tokens"
        reply = await http.post("/tokenize", json={"inputs": 1})
        assert reply.status_code == 422
        assert reply.text.startswith("Failed to deserialize the JSON body into the target type: inputs")


@pytest.mark.plain
async def test_a_chat_is_tokenized_with_the_places_in_its_templated_text() -> None:
    async with api(chat_template="{{ messages[0].content }}!<|im_end|>") as http:
        reply = await http.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "é"}]})
        answer = reply.json()
        assert list(answer) == ["tokenize_response", "templated_text"]
        assert answer["templated_text"] == "é!<|im_end|>"
        assert answer["tokenize_response"][0] == {"id": BOS, "text": "", "start": 0, "stop": 0}
        assert [(t["start"], t["stop"]) for t in answer["tokenize_response"][1:]] == [(0, 1), (1, 2), (2, 3), (3, 13)]
        refused = await http.post("/chat_tokenize", json={"messages": []})
        assert refused.status_code == 422
        assert refused.text.endswith("messages: must not be empty")


async def test_the_tokenizers_special_tokens_are_told_as_text() -> None:
    async with api(chat_template="{{ messages }}") as http:
        info = (await http.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", "{{ messages }}")
    assert isinstance(info["tokenizer_class"], str)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "hi?", "parameters": {"return_full_text": False}}),
        ("/", {"inputs": "hi?", "parameters": {"top_p": 1.0}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi?"}], "max_tokens": 2, "stream": True}),
        ("/v1/completions", {"prompt": "hi?", "max_tokens": 2}),
        ("/v1/completions", {"prompt": "hi?", "max_tokens": -2}),
    ],
)
async def test_invocations_answer_as_the_route_that_the_body_is_made_for(path: str, body: dict[str, object]) -> None:
    def timeless(text: str) -> str:
        return re.sub(r'"(id|created|cached_tokens)":("[^"]*"|\d+)', "", text)

    async with api(chat_template="{{ messages[0].content }}") as http:
        own, invoked = await http.post(path, json=body), await http.post("/invocations", json=body)
    assert invoked.status_code == own.status_code
    assert timeless(invoked.text) == timeless(own.text)
    assert invoked.headers["content-type"] == own.headers["content-type"]


async def test_invocations_of_no_known_shape_name_the_shapes() -> None:
    async with api() as http:
        reply = await http.post("/invocations", json={"texts": "hi"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (
        400,
        "body: one of inputs, messages and prompt is required",
    )


async def test_alternatives_that_tie_at_the_border_are_all_listed() -> None:
    async with api("a") as http:  # all tokens but one have the same logit
        details = (await ask(http, details=True, top_n_tokens=2, max_new_tokens=1)).json()["details"]
        assert len(details["top_tokens"][0]) == VOCAB_SIZE
        details = (await ask(http, details=True, top_n_tokens=1, max_new_tokens=1)).json()["details"]
        assert [token["text"] for token in details["top_tokens"][0]] == ["a"]
