"""Requests captured from SillyTavern 1.12.6 and 1.19.0, sent again to the real server.

All 160 captured exchanges are here, those whose scripted answer was an error as well; requests that are equal stand
once, under all their names. Prompts are cut as they were captured; only the model's name and the length of the answer
are changed.
"""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checkout import DATA
from fake_api import api

from tightrope.backends.errors import BackendError
from tightrope.server.dialects.koboldcpp import KoboldBody
from tightrope.server.dialects.llamacpp import CompletionBody
from tightrope.server.dialects.ollama.bodies import OllamaGenerate
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.fields.names import KNOWN
from tightrope.server.fields.sampling import read_sampling
from tightrope.server.http.body import Body, ignored_fields

Exchange = dict[str, Any]

EXCHANGES: list[Exchange] = [
    json.loads(line) for line in DATA.joinpath("sillytavern/requests.jsonl").read_text("utf-8").splitlines()
]
CLIENTS = sorted({(exchange["version"], exchange["type"]) for exchange in EXCHANGES})
GENERATES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/completion": CompletionBody,
    "/api/extra/generate/stream": KoboldBody,
    "/api/generate": OllamaGenerate,
}
LENGTHS = ("max_tokens", "max_new_tokens", "n_predict", "num_predict", "max_length")
LENGTH = 4  # tokens: enough for a stream, and few enough for all of them
VOCAB_SIZE = 49_152

ABORT = "/api/extra/abort"
SHOWS_EVERYTHING = "generate samplers set"  # a request with every slider moved and every box filled

# What may change nothing: notes of the client to itself, what the server decides, and samplers that are not built.
IGNORED = {"api_type", "api_server", "legacy_api", "truncation_length", "num_ctx", "max_context_length", "n_probs"}
IGNORED |= {"include_reasoning", "trim_stop", "cache_prompt", "keep_alive", "spaces_between_special_tokens"}
IGNORED |= {"use_story", "use_memory", "use_authors_note", "use_world_info", "singleline", "use_default_badwordsids"}
IGNORED |= {
    "n",
    "custom_token_bans",
    "logit_bias",
    "rep_pen_slope",
    "logprobs",
    "max_tokens",
    "sampler_seed",
    "xtc_probability",
}


def is_generate(exchange: Exchange) -> bool:
    return exchange["path"] in GENERATES


def playable(exchange: Exchange, model: str) -> Exchange:
    """The exchange with the served model's name and a short answer."""
    body = exchange["body"]
    if not isinstance(body, dict):
        return exchange
    body = {name: min(value, LENGTH) if name in LENGTHS else value for name, value in body.items()}
    if "options" in body:
        body["options"] = body["options"] | {"num_predict": LENGTH, "min_tokens": LENGTH}
    elif is_generate(exchange):
        body["min_tokens"] = LENGTH  # a model may well end at once
    if "model" in body and body["model"] not in ("tgi", "undefined"):
        body["model"] = model
    return exchange | {"body": body}


def played(http: httpx.Client, exchange: Exchange) -> httpx.Response:
    body = exchange["body"]
    content = None if body is None else json.dumps(body).encode()
    return http.request(exchange["method"], exchange["path"], headers=exchange["headers"], content=content)


def events(reply: httpx.Response) -> list[Any]:
    """The JSON of a stream, be it events or lines; the end mark and comments left out."""
    kept = [line for line in reply.text.splitlines() if line and not line.startswith((":", "event:"))]
    lines = [line.removeprefix("data: ") for line in kept]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(path: str, event: dict[str, Any]) -> str:
    match path:
        case "/v1/completions":
            return "".join(choice["text"] for choice in event["choices"])
        case "/v1/chat/completions":
            parts = [choice["delta" if "delta" in choice else "message"] for choice in event["choices"]]
            return "".join(part.get("content") or "" for part in parts)
        case "/completion":
            return str(event["content"])
        case "/api/generate":
            return str(event["response"])
    return str(event["token"])


def check_generated(exchange: Exchange, reply: httpx.Response) -> None:
    body, path = exchange["body"], exchange["path"]
    streams = body.get("stream") or path.endswith("/stream")
    pieces = events(reply) if streams else [reply.json()]
    for piece in pieces:
        assert not piece.keys() & {"error", "message", "detail"}, "the client takes these for a failure"
    assert "".join(text_of(path, piece) for piece in pieces)
    if streams:
        assert len(pieces) > 1
    if path == "/v1/completions":
        indices = {choice["index"] for piece in pieces for choice in piece["choices"]}
        assert indices == set(range(body.get("n", 1)))
        check_probabilities(body, pieces, streams=bool(streams))
    if path == "/completion" and body.get("n_probs"):
        entries = [entry for piece in pieces for entry in piece.get("completion_probabilities", ())]
        assert entries
        assert all(entry["probs"][0]["prob"] <= 1 for entry in entries)


def check_probabilities(body: dict[str, Any], pieces: list[Any], *, streams: bool) -> None:
    scored = [choice for piece in pieces for choice in piece["choices"] if choice.get("logprobs")]
    assert bool(scored) == ("logprobs" in body)
    for choice in scored:
        logprobs = choice["logprobs"]
        if streams:
            assert len(logprobs["top_logprobs"]) == 1, "the client reads the first of a chunk alone"
            if choice["finish_reason"] is None and "\ufffd" not in choice["text"]:
                assert choice["text"] in logprobs["top_logprobs"][0] or choice["text"] == ""
        else:
            assert len(logprobs["text_offset"]) == len(logprobs["top_logprobs"])
            assert logprobs["text_offset"][0] == 0


def check_status(exchange: Exchange, answer: dict[str, Any]) -> None:
    """What the client reads from answers that generate nothing."""
    match exchange["path"]:
        case "/v1/models" | "/v1/model/list":
            assert isinstance(answer["data"][0]["id"], str)
        case "/v1/model":
            assert isinstance(answer["id"], str)
        case "/v1/internal/model/info":
            assert isinstance(answer["model_name"], str)
        case "/info":
            assert isinstance(answer["model_id"], str)
        case "/props":
            assert answer["default_generation_settings"]["n_ctx"] > 0
            assert answer["chat_template"]
        case "/api/tags":
            assert isinstance(answer["models"][0]["name"], str)
        case "/api/v1/info/version" | "/api/extra/version" | "/api/v1/model":
            assert isinstance(answer["result"], str)
        case path if path == ABORT:
            assert answer == {"success": False}
        case path:
            assert path.rsplit("/", 1)[-1] in ("encode", "tokenize", "tokencount")
            counts = [answer[name] for name in ("length", "count", "value") if name in answer]
            ids = answer["tokens"] if "tokens" in answer else answer["ids"]
            assert [len(ids)] * len(counts) == counts
            assert ids


@pytest.fixture(scope="module")
def replies(server_url: str) -> list[tuple[Exchange, httpx.Response]]:
    """All exchanges, played side by side, but for those that would stop others."""
    with httpx.Client(base_url=server_url, timeout=300) as http, ThreadPoolExecutor(8) as pool:
        model = http.get("/v1/models").json()["data"][0]["id"]
        exchanges = [playable(exchange, model) for exchange in EXCHANGES]
        exchanges.sort(key=lambda exchange: exchange["path"] == ABORT)
        num_others = sum(exchange["path"] != ABORT for exchange in exchanges)
        found = list(pool.map(lambda exchange: played(http, exchange), exchanges[:num_others]))
        found += [played(http, exchange) for exchange in exchanges[num_others:]]
        return list(zip(exchanges, found, strict=True))


@pytest.mark.parametrize(("version", "kind"), CLIENTS)
def test_every_request_is_answered_in_the_shape_that_the_client_reads(
    replies: list[tuple[Exchange, httpx.Response]], version: str, kind: str
) -> None:
    for exchange, reply in replies:
        if (exchange["version"], exchange["type"]) != (version, kind):
            continue
        assert reply.status_code == 200, (exchange["what"], reply.text)
        if is_generate(exchange):
            check_generated(exchange, reply)
        else:
            check_status(exchange, reply.json())


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if SHOWS_EVERYTHING in e["what"]])
async def test_of_two_shapes_for_the_answer_the_schema_counts_and_the_grammar_is_listed(exchange: Exchange) -> None:
    body = {name: value for name, value in exchange["body"].items() if name != "model"}
    body |= {"stream": False, "explain": True, "min_tokens": 0, "max_tokens": 12, "ban_eos_token": False}
    async with api(max_model_len=4096) as http:
        answer = (await http.post(exchange["path"], json=body | {"ignore_eos": False})).json()
    assert re.match(r'\{\s*"a"', answer["choices"][0]["text"])
    whys = {entry["field"]: entry["why"] for entry in answer["explain"]["ignored"]}
    assert whys["grammar_string"] == "json_schema came too, and counts"
    assert answer["explain"]["samplers"][0] == {"guidance_scale": 1.5, "negative_prompt": "be rude"}


def fields_of(exchange: Exchange) -> tuple[Body, dict[str, Any]]:
    """The body as its route reads it, and the fields that hold the sampling."""
    body = GENERATES[exchange["path"]].model_validate(exchange["body"])
    return body, exchange["body"].get("options", exchange["body"])


@pytest.mark.parametrize(("version", "kind"), CLIENTS)
def test_no_field_is_lost_each_is_read_or_listed(version: str, kind: str) -> None:
    for exchange in EXCHANGES:
        if (exchange["version"], exchange["type"]) != (version, kind) or not is_generate(exchange):
            continue
        body, fields = fields_of(exchange)
        unread = {name.removeprefix("options.") for name in ignored_fields(body)}
        changed = dict(read_sampling({n: v for n, v in fields.items() if n in KNOWN}, VOCAB_SIZE).ignored)
        assert unread | changed.keys() <= IGNORED
        assert all(changed.values())


def test_every_captured_exchange_is_here() -> None:
    assert sum(len(exchange["what"]) for exchange in EXCHANGES) == 160


# The client shows `error.message` of a reply that is none, and of an event; in other places it looks for nothing.
@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if any(w.startswith("error unauth") for w in e["what"])])
async def test_a_wrong_key_is_told_in_words_that_the_client_shows(exchange: Exchange) -> None:
    async with api(api_key="another") as http:
        refused = await http.post(exchange["path"], json=exchange["body"], headers=exchange["headers"])
    assert refused.status_code == 401
    assert "API key" in refused.json()["error"]["message"]


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if any(w.startswith("error openai") for w in e["what"])])
async def test_a_prompt_that_is_too_long_is_told_in_words_that_the_client_shows(exchange: Exchange) -> None:
    body = {name: value for name, value in exchange["body"].items() if name != "model"}
    if "prompt" in body:
        body["prompt"] *= 10
    else:
        body["messages"] = body["messages"] * 10
    async with api() as http:
        refused = await http.post(exchange["path"], json=body)
    assert refused.status_code == 400
    assert "maximum context length is 1024 tokens" in refused.json()["error"]["message"]


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if "error in the stream" in e["what"]])
async def test_a_failure_in_mid_stream_is_told_in_words_that_the_client_shows(exchange: Exchange) -> None:
    written = 0

    def breaks(token_ids: Sequence[int]) -> int:
        nonlocal written
        written += 1
        if written > 3:
            raise BackendError("the engine stopped")
        return ord("a")

    body = {name: value for name, value in exchange["body"].items() if name not in ("model", *LENGTHS)}
    async with api(breaks, max_model_len=4096) as http:
        reply = await http.post(exchange["path"], json=body)
    *pieces, last = events(reply)
    assert reply.status_code == 200
    assert "".join(text_of(exchange["path"], piece) for piece in pieces) == "aaa"
    assert last["error"]["message"] == "the engine stopped"


async def test_special_tokens_written_as_text_are_parsed_in_a_raw_prompt() -> None:
    chatml = next(e for e in EXCHANGES if "generate chatml" in e["what"])
    async with api() as http:
        prompt = chatml["body"]["prompt"]
        counted = (await http.post("/v1/token/encode", json={"text": prompt})).json()
        plain = (await http.post("/v1/token/encode", json={"text": prompt, "encode_special_tokens": False})).json()
    assert prompt.count("<|im_end|>") > 0
    assert plain["length"] - counted["length"] == prompt.count("<|im_end|>") * (len("<|im_end|>") - 1)
