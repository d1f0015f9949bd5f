"""What the OpenAI API answers, to the key, whole and streamed."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fake_api import api, events
from fakes import EOS, script

from tightrope.backends.errors import BackendError
from tightrope.engine.types import Finish, FinishReason, Timings, Token, TopToken
from tightrope.server.dialects.openai.answers import chat_logprobs, completion_logprobs, finish_reason, stop_reason

ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
TEMPLATE = "{{ messages[0]['content'] }}?"
TEXT = "Grüße, 안녕하세요 👩‍👩‍👧!"


async def post(http: httpx.AsyncClient, path: str, **body: object) -> dict[str, Any]:
    reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def stream(http: httpx.AsyncClient, path: str, **body: object) -> list[Any]:
    reply = await http.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")
    return events(reply.text)


async def test_a_chat_answer_has_exactly_these_keys_in_this_order() -> None:
    async with api(TEXT, chat_template=TEMPLATE) as http:
        answer = await post(http, "/v1/chat/completions", **ASK)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "fake")
    assert isinstance(answer["system_fingerprint"], str)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num = len(TEXT.encode()) + 1  # one token a byte, and the end token
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": num,
        "total_tokens": num + 4,
        "prompt_tokens_details": {"cached_tokens": 0, "moved_tokens": 0},
    }


async def test_a_completion_has_exactly_these_keys_in_this_order() -> None:
    async with api("fine") as http:
        answer = await post(http, "/v1/completions", prompt="a?", max_tokens=2, temperature=0)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "fi", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]


async def test_a_streamed_chat_is_role_then_text_then_end() -> None:
    async with api("abc", chat_template=TEMPLATE) as http:
        *chunks, done = await stream(http, "/v1/chat/completions", **ASK)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
        assert chunk["object"] == "chat.completion.chunk"
    choices = [chunk["choices"][0] for chunk in chunks]
    opened = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert choices[0] == opened
    assert choices[1:-1] == [
        {"index": 0, "delta": {"content": letter}, "logprobs": None, "finish_reason": None} for letter in "abc"
    ]
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert choices[-1] == end


async def test_usage_comes_in_one_last_chunk_without_choices_if_asked_for() -> None:
    async with api("abc", chat_template=TEMPLATE) as http:
        options = {"include_usage": True}
        *chunks, usage, _ = await stream(http, "/v1/chat/completions", **ASK, stream_options=options)
        whole = await post(http, "/v1/chat/completions", **ASK)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stop", [[], ["하세"], ["👩‍👧", "녕"], ["nothing"]])
async def test_the_pieces_of_a_stream_are_the_whole_text_without_a_torn_character(path: str, stop: list[str]) -> None:
    async with api(TEXT, chat_template=TEMPLATE) as http:
        body = {"stop": stop, "temperature": 0, "max_tokens": 99}
        body |= {"prompt": "hi?"} if path == "/v1/completions" else {"messages": ASK["messages"]}
        whole = (await post(http, path, **body))["choices"][0]
        chunks = (await stream(http, path, **body))[:-1]
    pieces = [chunk["choices"][0].get("delta", chunk["choices"][0]) for chunk in chunks]
    texts = [piece.get("text", piece.get("content", "")) for piece in pieces]
    expected = TEXT
    for text in stop:
        expected = expected.split(text)[0]
    assert "".join(texts) == expected == whole.get("text", whole.get("message", {}).get("content"))
    assert not any("\ufffd" in text for text in texts)
    assert whole["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert whole["stop_reason"] == (None if expected == TEXT else stop[-1])


async def test_choices_of_a_stream_each_open_and_end_once() -> None:
    async with api("ab", chat_template=TEMPLATE) as http:
        chunks = (await stream(http, "/v1/chat/completions", **ASK, n=3))[:-1]
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant", None, None, None]
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]


async def test_batches_number_their_choices_prompt_by_prompt() -> None:
    async with api("abc") as http:
        body = {"prompt": ["x?", "longer?"], "n": 2, "max_tokens": 2, "temperature": 0, "echo": True}
        answer = await post(http, "/v1/completions", **body)
        chunks = (await stream(http, "/v1/completions", **body, stream_options={"include_usage": True}))[:-1]
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "x?ab"),
        (1, "x?ab"),
        (2, "longer?ab"),
        (3, "longer?ab"),
    ]
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == [c["text"] for c in answer["choices"]]
    assert answer["usage"]["prompt_tokens"] == chunks[-1]["usage"]["prompt_tokens"] == 3 + 8
    assert answer["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] == 8


async def test_echo_of_token_ids_shows_their_text_and_no_token_is_needed() -> None:
    async with api() as http:
        answer = await post(http, "/v1/completions", prompt=list(b"hi?"), echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "hi?"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


async def test_scoring_lists_every_given_id_and_the_one_written_even_if_it_ends() -> None:
    async with api(script("", end=EOS)) as http:
        body = {"prompt": [list(b"ab?")], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        logprobs = (await post(http, "/v1/completions", **body))["choices"][0]["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert logprobs["tokens"] == ["a", "b", "?", "</s>"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for name, value, top in list(zip(*list(logprobs.values())[:3], strict=True))[1:]:
        assert top[name] == value, "the very same float"
    assert logprobs["token_logprobs"][3] == max(logprobs["top_logprobs"][3].values())


async def test_a_bos_that_was_put_in_front_has_no_place_in_the_echoed_text() -> None:
    async with api() as http:
        answer = await post(http, "/v1/completions", prompt="ab?", max_tokens=1, logprobs=0, echo=True)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:4] == ["<s>", "a", "b", "?"]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3]


async def test_prompt_logprobs_score_each_id_of_the_prompt_beside_what_echo_shows() -> None:
    async with api() as http:
        body = {"prompt": list(b"ab?"), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2}
        (choice,) = (await post(http, "/v1/completions", **body))["choices"]
        (echoed,) = (await post(http, "/v1/completions", **body, echo=True, logprobs=0))["choices"]
    first, *scored = choice["prompt_logprobs"]
    assert first is None
    for token_id, entries in zip(b"b?", scored, strict=True):
        assert len(entries) in (2, 3), "two alternatives, and the prompt's own token if it is neither"
        assert entries[str(token_id)]["decoded_token"] == chr(token_id)
        ranked = sorted((e["rank"], e["logprob"]) for e in entries.values() if e["rank"] is not None)
        assert [rank for rank, _ in ranked] == [1, 2]
        assert ranked[0][1] >= ranked[1][1]
    assert choice["text"] == "f"
    assert echoed["prompt_logprobs"] == choice["prompt_logprobs"]
    assert [len(top or ()) for top in echoed["logprobs"]["top_logprobs"]] == [0, 1, 1, 1], "logprobs 0: no others"


async def test_a_chat_scores_its_prompt_too() -> None:
    async with api(chat_template=TEMPLATE) as http:
        (choice,) = (await post(http, "/v1/chat/completions", **ASK, prompt_logprobs=0))["choices"]
    assert [sorted(entries) for entries in choice["prompt_logprobs"][1:]] == [[str(i)] for i in b"hi?"]


async def test_streamed_logprobs_are_the_whole_answers_in_pieces() -> None:
    async with api("héy") as http:
        body = {"prompt": "a?", "logprobs": 2, "temperature": 0, "echo": True}
        whole = (await post(http, "/v1/completions", **body))["choices"][0]["logprobs"]
        chunks = (await stream(http, "/v1/completions", **body))[:-1]
    for key in ("tokens", "text_offset"):
        pieces = [c["choices"][0]["logprobs"] for c in chunks]
        assert [item for piece in pieces if piece for item in piece[key]] == whole[key]


async def test_chat_logprobs_list_every_token_with_exactly_as_many_alternatives_as_asked_for() -> None:
    async with api("é", chat_template=TEMPLATE) as http:
        body = {**ASK, "logprobs": True, "top_logprobs": 2}
        answer = await post(http, "/v1/chat/completions", **body)
        chunks = (await stream(http, "/v1/chat/completions", **body))[:-1]
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [entry["token"] for entry in logprobs["content"]] == ["bytes:\\xc3", "bytes:\\xa9", "</s>"]
    assert [entry["bytes"] for entry in logprobs["content"]] == [[0xC3], [0xA9], list(b"</s>")]
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs["content"])
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in logprobs["content"]]


def test_infinities_are_written_as_a_number_that_json_has() -> None:
    banned = Token(1, b"a", "a", float("-inf"), False, (TopToken(2, b"b", float("-inf"), False),))
    assert chat_logprobs([banned])["content"][0]["logprob"] == -9999.0
    assert completion_logprobs([banned])["top_logprobs"] == [{"b": -9999.0, "a": -9999.0}]


async def test_best_of_gives_the_likeliest_and_counts_all() -> None:
    async with api("abc") as http:
        answer = await post(http, "/v1/completions", prompt="a?", best_of=3, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 6


async def test_a_second_turn_tells_how_much_of_its_prompt_was_cached() -> None:
    async with api() as http:
        await post(http, "/v1/completions", prompt="a long beginning?", max_tokens=1)
        answer = await post(http, "/v1/completions", prompt="a long beginning? and more", max_tokens=1)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 18, "moved_tokens": 0}


async def test_a_failure_in_mid_stream_is_one_error_event_without_a_clean_end() -> None:
    def breaks(token_ids: Sequence[int]) -> int:
        if len(token_ids) > 6:
            raise BackendError("the model broke")
        return ord("a")

    async with api(breaks) as http:
        reply = await http.post("/v1/completions", json={"prompt": "abc?", "stream": True, "max_tokens": 9})
        assert reply.status_code == 200
        *chunks, last = events(reply.text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "aa"
        assert last["error"]["type"] == "server_error"
        whole = await http.post("/v1/completions", json={"prompt": "xyz?", "max_tokens": 9})
        assert whole.status_code == 500
        assert whole.json()["error"]["code"] == "server_error"
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("reason", "matched", "word", "detail"),
    [
        ("eos", 7, "stop", None),
        ("stop_token", 7, "stop", 7),
        ("stop_string", "end", "stop", "end"),
        ("length", None, "length", None),
        ("error", None, "error", "why"),
    ],
)
def test_every_end_has_openais_word_and_vllms_detail(
    reason: FinishReason, matched: str | int | None, word: str, detail: str | int | None
) -> None:
    finish = Finish(reason, 1, Timings(0, 0, 0), matched, "why")
    assert (finish_reason(finish), stop_reason(finish)) == (word, detail)


async def test_models_are_listed_and_found_by_name() -> None:
    async with api(served_model_name="org/name") as http:
        (card,) = (await http.get("/v1/models")).json()["data"]
        assert list(card) == ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "status"]
        assert (card["id"], card["object"], card["root"], card["max_model_len"]) == ("org/name", "model", "fake", 1024)
        assert (await http.get("/v1/models/org/name")).json() == card
        reply = await http.get("/v1/models/other/name")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"echo": True}, {"n": 2}])
async def test_a_completions_token_ids_come_beside_its_text_whole_and_in_pieces(more: dict[str, object]) -> None:
    body = {"prompt": ["hi?", "so?"], "return_token_ids": True, **more}
    async with api("fine") as http:
        whole = (await http.post("/v1/completions", json=body)).json()["choices"]
        pieces = events((await http.post("/v1/completions", json=body | {"stream": True})).text)
        prompts = [(await http.post("/tokenize", json={"prompt": text})).json()["tokens"] for text in body["prompt"]]

    for choice in whole:
        number, per_prompt = choice["index"], len(whole) // 2
        own = [c for piece in pieces if piece != "[DONE]" for c in piece["choices"] if c["index"] == number]
        assert choice["prompt_token_ids"] == prompts[number // per_prompt] == own[0]["prompt_token_ids"]
        assert all("prompt_token_ids" not in c for c in own[1:])
        assert choice["token_ids"][:4] == list(b"fine")
        assert [i for c in own for i in c["token_ids"]] == choice["token_ids"]


@pytest.mark.parametrize("more", [{}, {"logprobs": True}])
async def test_a_chats_token_ids_come_beside_its_message_whole_and_in_pieces(more: dict[str, object]) -> None:
    body = {"messages": [{"role": "user", "content": "hi?"}], "return_token_ids": True, **more}
    async with api("fine", chat_template="{{ messages[0].content }}") as http:
        whole = (await http.post("/v1/chat/completions", json=body)).json()
        pieces = events((await http.post("/v1/chat/completions", json=body | {"stream": True})).text)[:-1]
        plain = (await http.post("/v1/chat/completions", json=body | {"return_token_ids": False})).json()

    assert whole["prompt_token_ids"][-3:] == list(b"hi?") == pieces[0]["prompt_token_ids"][-3:]
    assert whole["choices"][0]["token_ids"][:4] == list(b"fine")
    told = [i for piece in pieces for choice in piece["choices"] for i in choice.get("token_ids", ())]
    assert told == whole["choices"][0]["token_ids"]
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces) == "fine"
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
