"""What clients and servers of every dialect know as a field is honoured, refused or listed: none is lost in silence.

Honoured is what changes the request that the engine gets, or the answer in another place than its record; refused is an
error that names the field; listed is an entry of the record of ignored fields, or of the log where there is no record.
"""

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from fake_api import api

from tightrope.engine.core import EngineCore
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import GenerateRequest

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ length }}"
    "{{ '?' if add_generation_prompt else '' }}"
)
USER = [{"role": "user", "content": "Well"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@dataclass(frozen=True, slots=True)
class Dialect:
    """A route, the least body that it answers, and the object in it that fields go into ("" is the body itself)."""

    path: str
    body: Mapping[str, Any]
    place: str = ""

    def with_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body with more fields."""
        if not self.place:
            return {**self.body, **fields}
        return {**self.body, self.place: self.body.get(self.place, {}) | fields}


DIALECTS: Mapping[str, Dialect] = {
    "openai chat": Dialect("/v1/chat/completions", {"messages": USER, "max_tokens": 8}),
    "openai completions": Dialect("/v1/completions", {"prompt": "Well?", "max_tokens": 8}),
    "tgi generate": Dialect("/generate", {"inputs": "Well?"}, "parameters"),
    "tgi generate, top level": Dialect("/generate", {"inputs": "Well?"}),
    "invocations, inputs": Dialect("/invocations", {"inputs": "Well?"}, "parameters"),
    "invocations, messages": Dialect("/invocations", {"messages": USER, "max_tokens": 8}),
    "invocations, prompt": Dialect("/invocations", {"prompt": "Well?", "max_tokens": 8}),
    "koboldcpp": Dialect("/api/v1/generate", {"prompt": "Well?", "max_length": 8}),
    "llama.cpp": Dialect("/completion", {"prompt": "Well?", "n_predict": 8}),
    "ollama generate": Dialect("/api/generate", {"prompt": "Well", "stream": False}),
    "ollama generate, options": Dialect("/api/generate", {"prompt": "Well", "stream": False}, "options"),
    "ollama raw": Dialect("/api/generate", {"prompt": "Well?", "stream": False, "raw": True}),
    "ollama chat": Dialect("/api/chat", {"messages": USER, "stream": False}),
    "ollama chat, options": Dialect("/api/chat", {"messages": USER, "stream": False}, "options"),
}
TOKENIZERS: Mapping[str, Dialect] = {
    "tokenize, vllm": Dialect("/tokenize", {"prompt": "Well?"}),
    "tokenize, vllm chat": Dialect("/v1/tokenize", {"messages": USER}),
    "tokenize, llama.cpp": Dialect("/tokenize", {"content": "Well?</s>"}),
    "tokenize, tgi": Dialect("/tokenize", {"inputs": "Well?"}),
    "tgi chat": Dialect("/chat_tokenize", {"messages": USER}),
    "detokenize": Dialect("/detokenize", {"tokens": [97, 98]}),
    "tabby encode": Dialect("/v1/token/encode", {"text": "Well?</s>"}),
    "tabby decode": Dialect("/v1/token/decode", {"tokens": [97, 98]}),
    "ooba encode": Dialect("/v1/internal/encode", {"text": "Well?"}),
    "ooba decode": Dialect("/v1/internal/decode", {"tokens": [97, 98]}),
    "ooba count": Dialect("/v1/internal/token-count", {"text": "Well?"}),
    "koboldcpp count": Dialect("/api/extra/tokencount", {"prompt": "Well?"}),
}

# Without these an answer would be another one than was asked for: they are honoured or refused, and never only listed.
MEANT: Mapping[str, Any] = {
    # what the model reads
    **dict.fromkeys(("memory", "system", "system_prompt", "instructions", "soft_prompt"), "You are a pirate."),
    "context": [1, 2, 3],
    **dict.fromkeys(("template", "chat_template", "chat_template_str", "prompt_template"), "{{ messages }}"),
    **dict.fromkeys(("instruction_template", "instruction_template_str", "tool_prompt"), "{{ messages }}"),
    **{key: {"length": "long"} for key in ("chat_template_kwargs", "template_vars")},
    **dict.fromkeys(("suffix", "input_prefix", "input_suffix", "guideline"), "the end"),
    "input_extra": [{"text": "a", "filename": "b"}],
    **{key: ["aGk="] for key in ("images", "image_data", "videos")},
    **{key: {"format": "wav"} for key in ("multimodal_data", "audio")},
    "modalities": ["text", "audio"],
    "documents": [{"title": "a", "text": "b"}],
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    **dict.fromkeys(("tool_choice", "function_call"), "required"),
    **dict.fromkeys(("preset", "character", "greeting", "user_bio", "chat_instruct_command"), "Seraphina"),
    "mode": "chat-instruct",
    **dict.fromkeys(("continue_", "impersonate", "echo"), True),
    "response_prefix": "Sure",
    "prompt_embeds": "aGk=",
    **{key: {"temperature": 0.5} for key in ("parameters", "options", "extra_body", "sampling_params")},
    "generation_config": {"temperature": 0.5},
    # which model, and which answers
    **dict.fromkeys(("model", "adapter_id", "lora_name", "lora_path"), "limarp"),
    **{key: [{"id": 0, "scale": 0.5}] for key in ("lora", "lora_adapters")},
    "lora_request": {"lora_name": "limarp"},
    "lora_names": ["limarp"],
    **dict.fromkeys(("n", "n_cmpl"), 2),
    "best_of": 2,
    # the shape of the answer
    "response_format": {"type": "json", "value": SCHEMA},
    "format": SCHEMA,
    **dict.fromkeys(("json_schema", "guided_json"), SCHEMA),
    **dict.fromkeys(("regex_pattern", "guided_regex", "regex", "guided_whitespace_pattern"), "[0-9]+"),
    "guided_choice": ["yes", "no"],
    **dict.fromkeys(("grammar_string", "guided_grammar", "ebnf"), 'root ::= "a"'),
    "grammar": {"type": "regex", "value": "[0-9]+"},
    "structured_outputs": {"regex": "[0-9]+"},
    "structural_tag": "x",
    **dict.fromkeys(("grammar_lazy", "grammar_retain_state"), True),
    # which tokens may come, and where it ends
    "logit_bias": {"97": 5},
    "custom_token_bans": "97,98",
    "banned_tokens": [97],
    "allowed_token_ids": [97, 98, 257],
    "allowed_tokens": [97, 98, 257],
    **{key: ["shivers"] for key in ("banned_strings", "bad_words")},
    "bad_words_ids": [[97]],
    "stop_token_ids": [98],
    **{key: ["xyz"] for key in ("stop", "stopping_strings", "stop_sequence", "stop_sequences")},
    **dict.fromkeys(("ignore_eos", "ban_eos_token", "use_default_badwordsids", "bypass_eos", "token_healing"), True),
    "negative_prompt": "rude",
    **dict.fromkeys(("guidance_scale", "cfg_scale"), 1.5),
    **dict.fromkeys(("num_beams", "n_indent", "t_max_predict_ms"), 4),
    **dict.fromkeys(("use_beam_search", "watermark"), True),
    "penalty_alpha": 0.6,
    "encoder_repetition_penalty": 1.2,
    "logits_processors": ["a"],
    "vllm_xargs": {"a": 1},
    **dict.fromkeys(("think", "post_sampling_probs"), True),
    "web_search_options": {"search_context_size": "low"},
    "thinking_token_budget": 9,
    "truncation_side": "right",
}
SAMPLING: Mapping[str, Any] = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    **dict.fromkeys(("typical_p", "typical", "typ_p", "tfs", "tfs_z", "top_a"), 0.5),
    **dict.fromkeys(("repetition_penalty", "rep_pen", "repeat_penalty"), 1.2),
    **dict.fromkeys(("frequency_penalty", "freq_pen", "presence_penalty", "presence_pen"), 0.5),
    **dict.fromkeys(("repetition_penalty_range", "penalty_range", "rep_pen_range", "repeat_last_n"), 64),
    **dict.fromkeys(("smoothing_factor", "top_n_sigma", "nsigma", "epsilon_cutoff", "eta_cutoff", "skew"), 0.5),
    "xtc_probability": 0.5,
    **dict.fromkeys(("mirostat", "mirostat_mode"), 2),
    "dry_multiplier": 0.8,
    "no_repeat_ngram_size": 3,
    "min_keep": 2,
    **dict.fromkeys(("seed", "sampler_seed"), 7),
    **dict.fromkeys(("min_tokens", "min_length"), 2),
    "dynatemp_range": 0.5,
    "adaptive_target": 0.5,
    "dynatemp_low": 0.5,
    "dynatemp_high": 1.5,
    "temperature_last": True,
    "do_sample": False,
    "sampler_order": [6, 5, 0, 1, 3, 4, 2],
    "sampler_priority": ["top_k", "temperature"],
    "samplers": "kpt",
    "auto_max_new_tokens": True,
    "include_stop_str_in_output": True,
    "rope_freq_base": 1e6,
    "smoothing_curve": 2,
    "xtc_threshold": 0.3,
    "mirostat_tau": 3,
    "mirostat_eta": 0.2,
    "adaptive_decay": 0.5,
    "dry_base": 2,
    "dry_allowed_length": 3,
    **dict.fromkeys(("dry_penalty_last_n", "dry_range"), 64),
    "dry_sequence_breakers": ["x"],
    **dict.fromkeys(("dynatemp_exponent", "temp_exponent"), 2),
    "repetition_decay": 64,
    **dict.fromkeys(("rep_pen_slope", "length_penalty", "max_tokens_second", "penalize_nl", "penalize_newline"), 0.7),
    **dict.fromkeys(("early_stopping", "speculative_ngram"), True),
}
OTHER: Mapping[str, Any] = {
    **dict.fromkeys(("user", "request_id", "safety_identifier", "prompt_cache_key", "session_id"), "me"),
    **{key: {"a": "b"} for key in ("metadata", "kv_transfer_params", "mm_processor_kwargs", "media_io_kwargs")},
    **dict.fromkeys(("store", "include_reasoning", "return_token_ids", "return_tokens", "quiet"), True),
    **dict.fromkeys(("timings_per_token", "return_progress", "return_tokens_as_token_ids", "shift"), True),
    **dict.fromkeys(("numa", "low_vram", "use_mmap", "singleline", "render_special", "enable_thinking"), True),
    **dict.fromkeys(("use_story", "use_memory", "use_world_info", "use_authors_note", "trim_stop"), True),
    **dict.fromkeys(("frmttriminc", "frmtrmblln", "frmtrmspch", "frmtadsnsp", "spaces_between_special_tokens"), True),
    **dict.fromkeys(("service_tier", "reasoning_effort", "verbosity", "guided_decoding_backend"), "low"),
    **dict.fromkeys(("api_type", "api_server", "name1", "name2", "user_name", "bot_name"), "tabby"),
    **dict.fromkeys(("priority", "num_thread", "num_gpu", "num_batch", "main_gpu", "id_slot", "n_probs"), 2),
    **dict.fromkeys(("num_ctx", "truncation_length", "max_context_length", "num_keep", "n_keep", "n_discard"), 512),
    **dict.fromkeys(("prompt_logprobs", "top_logprobs", "top_n_tokens", "truncate_prompt_tokens", "truncate"), 2),
    **dict.fromkeys(("skip_special_tokens", "add_bos_token", "add_special_tokens", "cache_prompt"), False),
    **dict.fromkeys(("logprobs", "details", "decoder_input_details", "return_full_text", "with_pieces"), True),
    **dict.fromkeys(("special", "add_special", "return_token_strs", "continue_final_message"), True),
    **dict.fromkeys(("parse_special", "encode_special_tokens", "decode_special_tokens"), False),
    "response_fields": ["content"],
    "keep_alive": "5m",
    "cache_salt": "pepper",
    "adapter_scale": 0.5,
    "stream_options": {"include_usage": True, "include_obfuscation": True},
    "parallel_tool_calls": False,
    "add_generation_prompt": False,
    "prediction": {"type": "content", "content": "a"},
    "zebra": 1,
}

BESIDE: Mapping[str, Mapping[str, Any]] = {  # what a field needs beside it to mean anything
    "negative_prompt": {"guidance_scale": 1.5},
    "smoothing_curve": {"smoothing_factor": 0.5},
    "xtc_threshold": {"xtc_probability": 0.5},
    **{key: {"mirostat_mode": 2} for key in ("mirostat_tau", "mirostat_eta")},
    "adaptive_decay": {"adaptive_target": 0.5},
    **{key: {"dry_multiplier": 0.8} for key in ("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range")},
    "dry_sequence_breakers": {"dry_multiplier": 0.8},
    **{key: {"dynatemp_range": 0.5} for key in ("dynatemp_exponent", "temp_exponent")},
    "repetition_decay": {"rep_pen_range": 64},
    "top_logprobs": {"logprobs": True},
    "parallel_tool_calls": {"tools": [TOOL]},
    "stream_options": {"stream": True},
    "top_n_tokens": {"details": True},
    "auto_max_new_tokens": {"max_tokens": 9},
}
VOLATILE = {"id", "created", "created_at", "timings", "seed", "explain", "stream"}


@dataclass(slots=True)
class Watched:
    """A running application, the requests that its engine has got, and what it has logged."""

    http: httpx.AsyncClient
    requests: list[GenerateRequest]
    log: pytest.LogCaptureFixture

    async def ask(self, dialect: Dialect, fields: Mapping[str, Any]) -> tuple[httpx.Response, list[Any]]:
        """The reply, and what of it and of the engine's requests doesn't change from one time to the next."""
        self.requests.clear()
        self.log.clear()
        reply = await self.http.post(dialect.path, json=dialect.with_fields(fields) | {"explain": True})
        asked = [msgspec.structs.replace(request, request_id="") for request in self.requests]
        if "seed" not in fields and "sampler_seed" not in fields:
            sampling = [msgspec.structs.replace(request.sampling, seed=None) for request in asked]
            asked = [msgspec.structs.replace(a, sampling=s) for a, s in zip(asked, sampling, strict=True)]
        return reply, [asked, stable(pieces(reply)) if reply.is_success else None]

    async def outcome(self, dialect: Dialect, name: str, value: object) -> str:
        """What becomes of a field: "honoured", "refused", "ignored"; or else "lost", with the reply."""
        beside = BESIDE.get(name, {})
        other, before = await self.ask(dialect, {**beside, name: not value} if isinstance(value, bool) else beside)
        if not other.is_success and beside:
            beside, before = {}, []  # refused itself, so that the field can change nothing
        reply, after = await self.ask(dialect, {**beside, name: value})
        if not reply.is_success:
            is_told = reply.is_client_error and name in reply.text
            return "refused" if is_told else f"lost: {reply.status_code} {reply.text}"
        if self.is_listed(reply, name):
            return "ignored"
        return "honoured" if after != before else f"lost: {reply.text}"

    def is_listed(self, reply: httpx.Response, name: str) -> bool:
        records = [piece["explain"] for piece in pieces(reply) if "explain" in piece]
        listed = [entry["field"] for record in records for entry in record["ignored"]]
        logged = [record.args for record in self.log.records if record.msg.startswith("fields ignored")]
        listed += [field for args in logged if isinstance(args, tuple) for field in args[1]]
        return name in {field.rpartition(".")[2] for field in listed}


def pieces(reply: httpx.Response) -> list[Any]:
    """The JSON of a reply, be it whole, events or lines."""
    if reply.headers["content-type"] == "application/json":
        return [*reply.json()] if isinstance(reply.json(), list) else [reply.json()]
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def stable(answer: object) -> object:
    """A reply without what is new each time."""
    if isinstance(answer, list):
        return [stable(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    return {n: stable(v) for n, v in answer.items() if n not in VOLATILE and not n.endswith(("duration", "details"))}


@pytest_asyncio.fixture
async def watched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> AsyncGenerator[Watched, None]:
    requests: list[GenerateRequest] = []
    prepare = EngineCore.prepare

    def recorded(core: EngineCore, request: GenerateRequest) -> list[Sequence]:
        requests.append(request)
        return prepare(core, request)

    monkeypatch.setattr(EngineCore, "prepare", recorded)
    caplog.set_level(logging.DEBUG, "tightrope.server")
    engine = EngineSettings.model_validate({"model": {"adapters": {"limarp": "limarp"}}})
    async with api("fine", chat_template=TEMPLATE, engine=engine) as http:
        yield Watched(http, requests, caplog)


NESTED = {"model"}  # names that no server has inside parameters or options
ONCE = [name for name in DIALECTS if not name.startswith("invocations") and name != "ollama raw"]


@pytest.mark.parametrize("name", DIALECTS)
async def test_what_an_answer_depends_on_is_honoured_or_refused(watched: Watched, name: str) -> None:
    dialect = DIALECTS[name]
    left_out = {*dialect.body, *(NESTED if dialect.place else ())}
    fields = {field: value for field, value in MEANT.items() if field not in left_out}
    outcomes = {field: await watched.outcome(dialect, field, value) for field, value in fields.items()}
    assert {field: what for field, what in outcomes.items() if what not in ("honoured", "refused")} == {}


@pytest.mark.parametrize("name", ONCE)
async def test_no_other_field_is_lost_in_silence(watched: Watched, name: str) -> None:
    dialect = DIALECTS[name]
    fields = {field: value for field, value in (SAMPLING | OTHER).items() if field not in dialect.body}
    outcomes = {field: await watched.outcome(dialect, field, value) for field, value in fields.items()}
    assert {field: what for field, what in outcomes.items() if what.startswith("lost")} == {}


@pytest.mark.parametrize("name", TOKENIZERS)
async def test_counting_tokens_loses_no_field_in_silence(watched: Watched, name: str) -> None:
    dialect = TOKENIZERS[name]
    given = MEANT | SAMPLING | OTHER | {"model": "another"}
    fields = {field: value for field, value in given.items() if field not in dialect.body}
    outcomes = {field: await watched.outcome(dialect, field, value) for field, value in fields.items()}
    assert {field: what for field, what in outcomes.items() if what.startswith("lost")} == {}


@pytest.mark.parametrize("name", [name for name in DIALECTS if not DIALECTS[name].place])
async def test_an_adapter_answers_wherever_a_model_is_named(watched: Watched, name: str) -> None:
    dialect = DIALECTS[name]
    await watched.ask(dialect, {"model": "limarp", "adapter_scale": 0.5})
    (request,) = watched.requests
    assert (request.adapter, request.adapter_scale) == ("limarp", 1.0 if "inputs" in dialect.body else 0.5)
    if "inputs" not in dialect.body:
        reply, _ = await watched.ask(dialect, {"model": "another"})
        assert reply.status_code == 404
        assert "`another` does not exist" in reply.json()["error"]["message"]
        assert watched.requests == []


async def test_ollamas_tag_stands_behind_an_adapter_as_behind_the_model(watched: Watched) -> None:
    chat = DIALECTS["ollama chat"]
    reply, _ = await watched.ask(chat, {"model": "limarp:latest"})
    assert reply.json()["model"] == "limarp"
    assert [request.adapter for request in watched.requests] == ["limarp"]
    reply, _ = await watched.ask(chat, {"model": "fake:latest"})
    assert reply.json()["model"] == "fake"
    listed = (await watched.http.get("/api/tags")).json()["models"]
    assert [model["name"] for model in listed] == ["fake", "limarp"]
    assert (await watched.http.post("/api/show", json={"model": "limarp"})).status_code == 200
    assert (await watched.http.post("/api/show", json={"model": "limarp:8b"})).status_code == 404


@pytest.mark.parametrize("name", [name for name in DIALECTS if "tgi" not in name and name != "invocations, inputs"])
async def test_biases_for_ids_outside_the_vocabulary_are_listed(watched: Watched, name: str) -> None:
    reply, _ = await watched.ask(DIALECTS[name], {"logit_bias": {"99999999": 5, "98": 5}})
    assert watched.is_listed(reply, "logit_bias")
    assert [request.sampling.logit_bias for request in watched.requests] == [{98: 5}]


async def test_salts_and_cuts_reach_the_engine_from_the_families_too(watched: Watched) -> None:
    namespaces = set()
    for name in ("koboldcpp", "llama.cpp", "ollama chat"):
        await watched.ask(DIALECTS[name], {"cache_salt": "pepper", "truncate_prompt_tokens": 2})
        (request,) = watched.requests
        assert request.truncate_to == 2
        namespaces.add(request.namespace)
    assert len(namespaces - {""}) == 1


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("koboldcpp", "memory"),
        ("ollama chat", "tools"),
        ("ollama chat", "messages[0].tool_calls"),
        ("ollama chat", "messages[0].tool_name"),
        ("ollama chat", "messages[0].images"),
        ("ollama generate", "template"),
        ("ollama generate", "context"),
        ("openai chat", "messages[0].prefix"),
    ],
)
async def test_what_is_not_built_is_refused_by_its_place(watched: Watched, name: str, path: str) -> None:
    field = path.rpartition(".")[2]
    dialect = DIALECTS[name]

    def body(value: object) -> dict[str, Any]:
        turns = [{**USER[0], field: value}]
        return {**dialect.body, "messages": turns} if "[0]" in path else {**dialect.body, field: value}

    reply = await watched.http.post(dialect.path, json=body([{"a": 1}]))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == path
    for neutral in ("", [], None, False, {}):
        assert (await watched.http.post(dialect.path, json=body(neutral))).status_code == 200


async def test_a_raw_prompt_does_not_lose_the_system_text(watched: Watched) -> None:
    raw = {"prompt": "Well?", "raw": True, "stream": False}
    refused = await watched.http.post("/api/generate", json=raw | {"system": "Be brief."})
    assert refused.json()["error"]["param"] == "system"
    assert (await watched.http.post("/api/generate", json=raw | {"system": ""})).status_code == 200


async def test_of_ollamas_two_places_the_options_count_and_the_other_is_listed(watched: Watched) -> None:
    body = {**DIALECTS["ollama chat"].body, "temperature": 0.2, "top_k": 3, "options": {"temperature": 0.7, "top_k": 3}}
    told = (await watched.http.post("/api/chat", json=body | {"explain": True})).json()["explain"]
    assert told["ignored"] == [{"field": "temperature", "why": "the options have it too, and count"}]
    assert [request.sampling.temperature for request in watched.requests] == [0.7]


async def test_a_shape_that_gives_way_to_a_forced_call_is_listed(watched: Watched) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    reply, _ = await watched.ask(DIALECTS["openai chat"], fields)
    assert [entry["field"] for entry in reply.json()["explain"]["ignored"]] == ["response_format"]


async def test_unread_fields_are_logged_once_with_the_route(watched: Watched) -> None:
    await watched.http.post("/v1/token/encode", json={"text": "a", "zebra": 1})
    messages = [record.getMessage() for record in watched.log.records]
    assert messages.count("fields ignored: path=/v1/token/encode fields=['zebra']") == 1
