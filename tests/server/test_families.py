"""What clients of TabbyAPI, text-generation-webui, llama.cpp, KoboldCpp and Ollama ask, and what they get."""

import asyncio
import json
import math
from typing import Any

import httpx
import pytest
from fake_api import api, events

from tightrope.engine.types import Delta, Finish, PromptInfo, Timings, Token
from tightrope.server.deltas.one_token import one_token_each
from tightrope.server.deltas.side_by_side import Deltas

KEYLESS = {"/v1/model/list", "/v1/model", "/props", "/slots", "/api/tags", "/api/v1/model", "/api/extra/version"}


def lines(body: str) -> list[Any]:
    return [json.loads(line) for line in body.splitlines()]


async def test_tabby_shows_the_model_and_the_window() -> None:
    async with api(served_model_name="Lantern") as http:
        listed = (await http.get("/v1/model/list")).json()
        card = (await http.get("/v1/model")).json()
        assert listed == {"object": "list", "data": [card]}
        assert card["id"] == "Lantern"
        assert card["parameters"]["max_seq_len"] == 1024
        assert (await http.get("/v1/auth/permission")).json() == {"permission": "api"}
        for path in ("/v1/lora", "/v1/loras", "/v1/lora/list", "/v1/template/list"):
            assert (await http.get(path)).json() == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/token/encode", {"text": "ab"}, {"tokens": [97, 98], "length": 2}),
        ("/v1/token/encode", {"text": "a", "add_bos_token": True}, {"tokens": [256, 97], "length": 2}),
        ("/v1/token/encode", {"text": "</s>"}, {"tokens": [257], "length": 1}),
        ("/v1/token/encode", {"text": "</s>", "encode_special_tokens": False}, {"tokens": list(b"</s>"), "length": 4}),
        ("/v1/token/encode", {"text": ""}, {"tokens": [], "length": 0}),
        ("/v1/token/decode", {"tokens": [97, 257]}, {"text": "a</s>"}),
        ("/v1/internal/encode", {"text": "ab"}, {"tokens": [97, 98], "length": 2}),
        ("/v1/internal/token-count", {"text": "ab"}, {"length": 2}),
        ("/v1/internal/decode", {"tokens": [97, 98]}, {"text": "ab"}),
        ("/tokenize", {"content": "ab", "model": "undefined"}, {"tokens": [97, 98]}),
        ("/detokenize", {"tokens": [97, 98]}, {"prompt": "ab", "content": "ab"}),
        ("/api/extra/tokencount", {"prompt": "ab"}, {"value": 2, "ids": [97, 98]}),
        ("/api/extra/tokencount", {"prompt": "a", "special": True}, {"value": 2, "ids": [256, 97]}),
    ],
)
async def test_every_family_counts_tokens_in_its_own_shape(
    path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    async with api() as http:
        assert (await http.post(path, json=body)).json() == expected


async def test_ooba_and_kobold_and_ollama_show_the_model() -> None:
    async with api(served_model_name="Lantern") as http:
        assert (await http.get("/v1/internal/model/info")).json() == {"model_name": "Lantern", "lora_names": []}
        assert (await http.get("/api/v1/model")).json() == {"result": "koboldcpp/Lantern"}
        assert (await http.get("/api/v1/info/version")).json() == {"result": "1.2.5"}
        assert (await http.get("/api/extra/version")).json()["result"] == "KoboldCpp"
        assert (await http.get("/api/extra/true_max_context_length")).json() == {"value": 1024}
        assert (await http.get("/api/tags")).json()["models"][0]["name"] == "Lantern"
        shown = (await http.post("/api/show", json={"name": "Lantern:latest"})).json()
        assert shown["model_info"]["rules.context_length"] == 1024
        assert (await http.post("/api/show", json={"model": "Other"})).status_code == 200
    async with api(any_model_name=False) as http:
        refused = await http.post("/api/show", json={"model": "Other"})
        assert (refused.status_code, refused.json()) == (404, {"error": "The model `Other` does not exist."})


async def test_llama_cpp_props_hold_the_window_and_the_template() -> None:
    async with api(chat_template="{{ messages }}") as http:
        props = (await http.get("/props")).json()
        assert props["default_generation_settings"]["n_ctx"] == 1024
        assert props["chat_template"] == "{{ messages }}"
        slots = (await http.get("/slots")).json()
        assert len(slots) == props["total_slots"] == 8
        assert not any(slot["is_processing"] for slot in slots)


async def test_completion_answers_whole_and_streamed_alike() -> None:
    body = {"prompt": "Well?", "n_predict": 40}
    async with api("Fine.") as http:
        whole = (await http.post("/completion", json=body)).json()
        *pieces, last = events((await http.post("/completion", json=body | {"stream": True})).text)
    assert whole["content"] == "Fine." == "".join(piece["content"] for piece in pieces)
    assert [whole["stopped_eos"], whole["stopped_limit"], whole["stopped_word"]] == [True, False, False]
    assert not any(piece["stop"] for piece in pieces)
    assert (last["content"], last["stop"]) == ("", True)
    assert last["tokens_predicted"] == whole["tokens_predicted"] == 6
    assert last["tokens_evaluated"] == 6


@pytest.mark.parametrize(
    ("fields", "stop_type", "word"), [({"stop": ["ne"]}, "word", "ne"), ({"n_predict": 2}, "limit", "")]
)
async def test_completion_says_how_it_ended(fields: dict[str, Any], stop_type: str, word: str) -> None:
    async with api("Fine.") as http:
        answer = (await http.post("/completion", json={"prompt": "Well?", **fields})).json()
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == ("Fi", stop_type, word)


async def test_completion_takes_token_ids_and_refuses_those_it_does_not_know() -> None:
    async with api("Fine.") as http:
        assert (await http.post("/completion", json={"prompt": [97, 63]})).json()["content"] == "Fine."
        refused = await http.post("/completion", json={"prompt": [97, 259]})
        assert refused.status_code == 400
        assert "259 is no token id below 259" in refused.json()["error"]["message"]
        assert (await http.post("/completion", json={"prompt": ""})).status_code == 400


async def test_completion_lists_probabilities_one_token_an_event() -> None:
    body = {"prompt": "Well?", "n_probs": 3, "stop": ["!!"]}
    async with api("No! Yes.") as http:
        whole = (await http.post("/completion", json=body)).json()
        streamed = events((await http.post("/completion", json=body | {"stream": True})).text)
    listed = whole["completion_probabilities"]
    assert [entry["content"] for entry in listed] == [*"No! Yes.", "</s>"]
    assert {probs["tok_str"] for probs in listed[0]["probs"]} >= {"N"}
    assert math.isclose(math.exp(listed[0]["top_logprobs"][0]["logprob"]), listed[0]["probs"][0]["prob"])
    for event in streamed[:-2]:
        (entry,) = event["completion_probabilities"]
        assert entry["content"] == event["content"]
    assert [entry for event in streamed for entry in event.get("completion_probabilities", ())] == listed


async def test_kobold_answers_whole_and_streamed_alike() -> None:
    body = {"prompt": "Well?", "max_length": 40, "stop_sequence": [" you"]}
    async with api("Fine, thank you.") as http:
        (whole,) = (await http.post("/api/v1/generate", json=body)).json()["results"]
        streamed = (await http.post("/api/extra/generate/stream", json=body)).text
    assert (whole["text"], whole["finish_reason"]) == ("Fine, thank", "stop")
    assert whole["prompt_tokens"] == 6
    pieces = [json.loads(event.removeprefix("event: message\ndata: ")) for event in streamed.split("\n\n")[:-1]]
    assert "".join(piece["token"] for piece in pieces) == whole["text"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


async def test_an_abort_stops_the_generations_under_its_key_alone() -> None:
    endless = {"prompt": "Well?", "max_length": 900}
    async with api("so ", max_body_bytes=10_000) as http:
        assert (await http.post("/api/extra/abort")).json() == {"success": False}

        async def generate(key: str) -> httpx.Response:
            return await http.post("/api/v1/generate", json=endless | {"genkey": key, "ignore_eos": True})

        first = asyncio.create_task(generate("KCPP1"))
        while not (await http.post("/api/extra/abort", json={"genkey": "KCPP1"})).json()["success"]:
            await asyncio.sleep(0)
        (result,) = (await first).json()["results"]
        assert result["completion_tokens"] < 900
        (result,) = (await generate("KCPP2")).json()["results"]
        assert result["completion_tokens"] == 900


async def test_ollama_answers_whole_and_in_lines_alike() -> None:
    body = {"model": "fake", "prompt": "Well?", "raw": True, "options": {"num_predict": 3, "temperature": 0.5}}
    async with api("Fine.") as http:
        whole = (await http.post("/api/generate", json=body | {"stream": False})).json()
        streamed = await http.post("/api/generate", json=body)
    assert streamed.headers["content-type"].startswith("application/x-ndjson")
    *pieces, last = lines(streamed.text)
    assert whole["response"] == "Fin" == "".join(piece["response"] for piece in pieces)
    assert not any(piece["done"] for piece in pieces)
    for ending in (whole, last):
        assert (ending["done"], ending["done_reason"], ending["eval_count"]) == (True, "length", 3)


async def test_ollama_writes_what_is_not_raw_by_the_chat_template() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}?"
    async with api("Fine.", chat_template=template) as http:
        body = {"system": "Be brief.", "prompt": "Well", "stream": False}
        one = (await http.post("/api/generate", json=body)).json()
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well"}]
        chat = (await http.post("/api/chat", json={"messages": turns, "stream": False})).json()
    assert one["response"] == "Fine." == chat["message"]["content"]
    assert one["prompt_eval_count"] == chat["prompt_eval_count"] == 1 + len("[system]Be brief.[user]Well?")


async def test_ollama_lists_log_probabilities_one_token_a_line() -> None:
    body = {"prompt": "Well?", "raw": True, "logprobs": True, "top_logprobs": 2}
    async with api("Fine.") as http:
        whole = (await http.post("/api/generate", json=body | {"stream": False})).json()
        streamed = lines((await http.post("/api/generate", json=body)).text)
        refused = await http.post("/api/generate", json={"prompt": "Well?", "top_logprobs": 2})
    assert [entry["token"] for entry in whole["logprobs"]] == [*"Fine.", "</s>"]
    assert [len(entry["top_logprobs"]) for entry in whole["logprobs"]] == [2] * 6
    assert [entry for line in streamed for entry in line.get("logprobs", ())] == whole["logprobs"]
    assert all(line["logprobs"][0]["token"] == line["response"] for line in streamed[:5])
    assert refused.json()["error"].startswith("top_logprobs")


async def test_ollama_names_the_model_as_loaded_when_nothing_is_asked() -> None:
    async with api() as http:
        for path, extra in (("/api/generate", {}), ("/api/chat", {"messages": []})):
            (line,) = lines((await http.post(path, json={"model": "fake:latest", **extra})).text)
            assert (line["done"], line["done_reason"]) == (True, "load")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/completion", {"prompt": "a", "temperature": -1}, "temperature"),
        ("/completion", {"prompt": "a", "n_probs": 99}, "n_probs"),
        ("/completion", {}, "prompt"),
        ("/api/v1/generate", {"prompt": ""}, "prompt"),
        ("/api/v1/generate", {"prompt": "a", "rep_pen": 0}, "rep_pen"),
        ("/api/generate", {"prompt": "a", "options": {"top_p": 2}}, "top_p"),
        ("/api/generate", {"prompt": "a", "images": ["x"]}, "images"),
        ("/v1/token/encode", {"text": 1}, "text"),
    ],
)
async def test_what_cannot_be_had_is_refused_with_the_fields_name(path: str, body: dict[str, Any], param: str) -> None:
    async with api() as http:
        refused = await http.post(path, json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]  # Ollama's clients show it as it is.
    assert error.startswith(param) if path == "/api/generate" else error["param"] == param


@pytest.mark.parametrize("path", ["/completion", "/api/v1/generate", "/api/extra/generate/stream", "/api/generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_fails_is_an_error_and_no_clean_end(path: str, stream: bool) -> None:
    bans = {"custom_token_bans": list(range(259))}
    async with api() as http:
        body = {"prompt": "a", "stream": stream}
        reply = await http.post(path, json=body | ({"raw": True, "options": bans} if path == "/api/generate" else bans))
    last = reply.text.rstrip("\n").rsplit("\n", 1)[-1].removeprefix("data: ")
    assert "no token can be drawn" in str(json.loads(last)["error"])
    assert reply.status_code == (200 if path.endswith("stream") or (stream and "v1" not in path) else 500)


async def test_a_prompt_over_the_window_is_told_with_both_numbers() -> None:
    fields = {
        "/completion": {"n_predict": 8},
        "/api/generate": {"raw": True, "options": {"num_predict": 8}},
    }
    async with api() as http:
        for path, own in fields.items():
            refused = await http.post(path, json={"prompt": "a" * 2000, "stream": True, **own})
            assert refused.status_code == 400
            message = str(refused.json()["error"])
            assert "1024" in message
            assert "2001" in message


async def test_a_url_without_v1_serves_models_and_chats() -> None:
    async with api("Fine.", chat_template="{{ messages[0].content }}") as http:
        assert (await http.get("/models")).json() == (await http.get("/v1/models")).json()
        body = {"messages": [{"role": "user", "content": "Well?"}]}
        answer = (await http.post("/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == "Fine."


@pytest.mark.parametrize(
    "headers",
    [{"x-api-key": "sk-1"}, {"X-API-KEY": "sk-1", "Authorization": "Bearer x"}, {"Authorization": "Bearer sk-1"}],
)
async def test_a_key_is_taken_in_either_header(headers: dict[str, str]) -> None:
    async with api(api_key="sk-1") as http:
        for path in KEYLESS:
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"x-api-key": ""})).status_code == 401
            assert (await http.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize("header", ["Bearer undefined", "Bearer", ""])
async def test_a_server_without_keys_minds_none(header: str) -> None:
    async with api() as http:
        assert (await http.get("/v1/models", headers={"Authorization": header})).status_code == 200


# ---- one token an event ----


def token(text: str) -> Token:
    return Token(1, text.encode(), text, -0.5, False)


async def cut(*deltas: Delta) -> list[Delta]:
    async def given() -> Deltas:
        for delta in deltas:
            yield 0, delta

    return [delta async for _, delta in one_token_each(given())]


PROMPT = PromptInfo(1, 0, 7)
END = Finish("stop_string", 3, Timings(0, 0, 0), "\nB")


async def test_text_that_was_held_back_comes_with_its_own_tokens() -> None:
    made = await cut(
        Delta("r", 0, "", (token("\n"),), PROMPT),
        Delta("r", 0, "\nA", (token("A"),)),
        Delta("r", 0, "x", (token("x"),)),
    )
    assert [(delta.text, [t.text for t in delta.tokens]) for delta in made] == [
        ("", []),
        ("\n", ["\n"]),
        ("A", ["A"]),
        ("x", ["x"]),
    ]
    assert [delta.prompt for delta in made] == [PROMPT, None, None, None]


async def test_tokens_that_a_stop_string_cut_come_with_what_is_left_of_them() -> None:
    made = await cut(Delta("r", 0, "", (token("a\n"),), PROMPT), Delta("r", 0, "a", (token("B"),), finish=END))
    assert [(delta.text, [t.text for t in delta.tokens]) for delta in made] == [
        ("", []),
        ("a", ["a\n"]),
        ("", ["B"]),
        ("", []),
    ]
    assert [delta.finish for delta in made] == [None, None, None, END]


async def test_the_first_delta_of_all_tells_of_the_prompt_even_if_it_ends_there() -> None:
    (first, last) = await cut(Delta("r", 0, "a", (token("a"),), PROMPT, END))
    assert (first.prompt, first.finish, last.prompt, last.finish) == (PROMPT, None, None, END)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/generate", {"prompt": "How?", "logprobs": True}),
        ("/api/extra/generate/stream", {"prompt": "How?", "logprobs": 3}),
        ("/api/chat", {"messages": [{"role": "user", "content": "How?"}], "options": {"logprobs": True}}),
    ],
)
async def test_log_probabilities_are_refused_where_an_answer_has_no_place_for_them(
    path: str, body: dict[str, object]
) -> None:
    async with api() as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 400
    assert "logprobs: they are given on /v1/completions and /v1/chat/completions" in reply.text
