"""Every name of a field that clients and servers of any dialect know, with a value that means something."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from tightrope.server.dialects.anthropic.bodies import MessagesRequest
from tightrope.server.dialects.koboldcpp import KoboldBody
from tightrope.server.dialects.llamacpp import CompletionBody
from tightrope.server.dialects.ollama.bodies import OllamaChat, OllamaGenerate
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.dialects.responses.requests import ResponsesRequest
from tightrope.server.dialects.tgi.requests import CompatBody, GenerateBody
from tightrope.server.fields.names import NOT_BUILT, NUMBERS, ROPE, WITHOUT_EFFECT
from tightrope.server.fields.numbers import Number
from tightrope.server.http.body import Body

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ length }}"
    "{{ reasoning_effort }}{{ enable_thinking }}{{ '?' if add_generation_prompt else '' }}{# <think> </think> #}"
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
    reads: type[Body] = Body  # the type of the whole body
    otherwise: Mapping[str, str] = field(default_factory=dict)  # what becomes of fields on this route alone
    values: Mapping[str, Any] = field(default_factory=dict)  # of fields that mean something else on this route
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the same

    def with_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body with more fields."""
        if not self.place:
            return {**self.body, **fields}
        return {**self.body, self.place: self.body.get(self.place, {}) | fields}

    @property
    def fields(self) -> frozenset[str]:
        """Every name that the reader knows in that place, from its own type."""
        known = self.reads
        if self.place:
            held = self.reads.model_fields[self.place].annotation
            known = next(kind for kind in (held, *get_args(held)) if isinstance(kind, type) and issubclass(kind, Body))
        assert isinstance(known.read_elsewhere, Collection)
        return frozenset({*known.model_fields, *known.read_elsewhere})


FLAT_TOOL = {"type": "function", **TOOL["function"]}
RESPONSES = Dialect(
    "/v1/responses",
    {"input": "Well", "max_output_tokens": 8},
    reads=ResponsesRequest,
    otherwise={
        **dict.fromkeys(("metadata", "truncation"), "answered"),
        **dict.fromkeys(("store", "stream_options"), "ignored"),
        **dict.fromkeys(("previous_response_id", "conversation", "background"), "refused"),
    },
    values={
        "input": [{"role": "user", "content": "Other"}],
        "tools": [FLAT_TOOL],
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "high"},
        "truncation": "auto",
        "include": ["message.output_text.logprobs"],
        **dict.fromkeys(("previous_response_id", "conversation"), "resp_1"),
        "background": True,
    },
    beside={key: {"tools": [FLAT_TOOL]} for key in ("tool_choice", "parallel_tool_calls")},
)
ANTHROPIC_TOOL = {"name": "f", "input_schema": {"type": "object"}}
MESSAGES = Dialect(
    "/v1/messages",
    {"messages": USER, "max_tokens": 8},
    reads=MessagesRequest,
    otherwise={"metadata": "ignored"},
    values={
        "tools": [ANTHROPIC_TOOL],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "output_format": {"type": "json_schema", "schema": SCHEMA},
    },
    beside={"tool_choice": {"tools": [ANTHROPIC_TOOL]}},
)
DIALECTS: Mapping[str, Dialect] = {
    "responses": RESPONSES,
    "anthropic": MESSAGES,
    "openai chat": Dialect("/v1/chat/completions", {"messages": USER, "max_tokens": 8}, reads=ChatRequest),
    "openai completions": Dialect("/v1/completions", {"prompt": "Well?", "max_tokens": 8}, reads=CompletionRequest),
    "tgi generate": Dialect("/generate", {"inputs": "Well?"}, "parameters", reads=GenerateBody),
    "tgi generate, top level": Dialect("/generate", {"inputs": "Well?"}, reads=GenerateBody),
    "tgi": Dialect("/", {"inputs": "Well?"}, reads=CompatBody, otherwise={"stream": "asked"}),
    "invocations, inputs": Dialect("/invocations", {"inputs": "Well?"}, "parameters", reads=CompatBody),
    "invocations, messages": Dialect("/invocations", {"messages": USER, "max_tokens": 8}, reads=ChatRequest),
    "invocations, prompt": Dialect("/invocations", {"prompt": "Well?", "max_tokens": 8}, reads=CompletionRequest),
    "koboldcpp": Dialect("/api/v1/generate", {"prompt": "Well?", "max_length": 8}, reads=KoboldBody),
    "llama.cpp": Dialect("/completion", {"prompt": "Well?", "n_predict": 8}, reads=CompletionBody),
    "ollama generate": Dialect("/api/generate", {"prompt": "Well", "stream": False}, reads=OllamaGenerate),
    "ollama generate, options": Dialect(
        "/api/generate", {"prompt": "Well", "stream": False}, "options", reads=OllamaGenerate
    ),
    "ollama raw": Dialect(
        "/api/generate",
        {"prompt": "Well?", "stream": False, "raw": True},
        reads=OllamaGenerate,
        otherwise={"system": "refused", "think": "ignored"},
    ),
    "ollama chat": Dialect("/api/chat", {"messages": USER, "stream": False}, reads=OllamaChat),
    "ollama chat, options": Dialect("/api/chat", {"messages": USER, "stream": False}, "options", reads=OllamaChat),
}
TOKENIZERS: Mapping[str, Dialect] = {
    "responses count": Dialect("/v1/responses/input_tokens", {"input": "Well"}),
    "anthropic count": Dialect("/v1/messages/count_tokens", {"messages": USER}),
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
    **dict.fromkeys(("disable_any_whitespace", "lenient_schema"), True),
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
    **dict.fromkeys(("thinking_token_budget", "thinking_budget"), 9),
    "truncation_side": "right",
}


def value_of(number: Number) -> float:
    """One that is in the number's interval, and not neutral."""
    return max(number.interval.low, 0) + (2 if number.interval.whole else 0.5)


SAMPLING: Mapping[str, Any] = {
    **{name: value_of(number) for number in NUMBERS for name in number.names},
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
    "adaptive_decay": 0.5,
    "xtc_ignore_tokens": [98],
    "dry_sequence_breakers": ["x"],
    **dict.fromkeys(("dynatemp_exponent", "temp_exponent"), 2),
    **dict.fromkeys(("rep_pen_slope", "length_penalty", "max_tokens_second", "penalize_nl", "penalize_newline"), 0.7),
    **dict.fromkeys(("early_stopping", "speculative_ngram"), True),
}
OTHER: Mapping[str, Any] = {
    **dict.fromkeys(("user", "request_id", "safety_identifier", "prompt_cache_key", "session_id"), "me"),
    **{key: {"a": "b"} for key in ("metadata", "kv_transfer_params", "mm_processor_kwargs", "media_io_kwargs")},
    **dict.fromkeys(("store", "include_reasoning", "return_token_ids", "return_tokens", "quiet"), True),
    **dict.fromkeys(("timings_per_token", "return_progress", "resumable", "return_tokens_as_token_ids", "shift"), True),
    **dict.fromkeys(("numa", "low_vram", "use_mmap", "singleline", "render_special", "enable_thinking"), True),
    **dict.fromkeys(("use_story", "use_memory", "use_world_info", "use_authors_note", "trim_stop"), True),
    **dict.fromkeys(("frmttriminc", "frmtrmblln", "frmtrmspch", "frmtadsnsp", "spaces_between_special_tokens"), True),
    **dict.fromkeys(("service_tier", "reasoning_effort", "verbosity", "guided_decoding_backend"), "low"),
    **dict.fromkeys(("api_type", "api_server", "name1", "name2", "user_name", "bot_name"), "tabby"),
    **dict.fromkeys(("priority", "num_thread", "num_gpu", "num_batch", "main_gpu", "id_slot", "n_probs"), 2),
    **dict.fromkeys(("num_ctx", "truncation_length", "num_keep", "n_keep", "n_discard"), 512),
    "max_context_length": 3,
    **dict.fromkeys(("prompt_logprobs", "top_logprobs", "top_n_tokens", "truncate_prompt_tokens", "truncate"), 2),
    **dict.fromkeys(("skip_special_tokens", "add_bos_token", "add_special_tokens", "cache_prompt"), False),
    **dict.fromkeys(("logprobs", "details", "decoder_input_details", "return_full_text", "with_pieces"), True),
    **dict.fromkeys(("special", "add_special", "return_token_strs", "continue_final_message"), True),
    **dict.fromkeys(("parse_special", "encode_special_tokens", "decode_special_tokens"), False),
    "response_fields": ["content"],
    "keep_alive": "5m",
    "cache_salt": "pepper",
    "cache_reuse": "exact",
    "adapter_scale": 0.5,
    "reasoning_format": "none",
    "stream_options": {"include_usage": True, "include_obfuscation": True},
    "parallel_tool_calls": False,
    "add_generation_prompt": False,
    "prediction": {"type": "content", "content": "a"},
    "zebra": 1,
}

LENGTHS: Mapping[str, Any] = dict.fromkeys(
    (
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "max_new_tokens",
        "max_length",
        "n_predict",
        "num_predict",
    ),
    9,
)
SPOKEN: Mapping[str, Any] = {  # what is asked, and how it is to be answered
    **dict.fromkeys(("prompt", "inputs"), "Other?"),
    "messages": [{"role": "user", "content": "Other"}],
    **dict.fromkeys(("stream", "raw"), True),
    "genkey": "KCPP1",
}
ALIASES: Mapping[str, Any] = {
    **dict.fromkeys(("rope_scaling", "rope_factor", "rope_theta", "rope_scale", "rope_alpha", "alpha_value"), 2),
    **dict.fromkeys(("compress_pos_emb", "rope_freq_scale", "rope_frequency_base", "rope_frequency_scale"), 2),
    "dynamic_temperature": False,
    **dict.fromkeys(("dynatemp_min", "min_temp"), 0.5),
    **dict.fromkeys(("dynatemp_max", "max_temp"), 1.5),
}
VALUES: Mapping[str, Any] = MEANT | SAMPLING | OTHER | LENGTHS | SPOKEN | ALIASES

# What becomes of a field that a reader knows: the engine's request has it, unless it stands here.
ANSWERED = {
    "stream",
    "stream_options",
    "echo",
    "return_full_text",
    "include_reasoning",
    "reasoning_format",
    "return_token_ids",
}  # seen in the answer alone
REFUSED = {*ROPE, *NOT_BUILT, "suffix", "documents"}
LISTED = {
    *WITHOUT_EFFECT,
    "cache_prompt",
    "keep_alive",
    "return_progress",
    "resumable",
}  # of whole answers
UNSEEN = {"explain", "genkey"}  # adds the record that all of this is told from; names the answer to an abort
EXPECTED: Mapping[str, str] = {
    **dict.fromkeys(ANSWERED, "answered"),
    **dict.fromkeys(REFUSED, "refused"),
    **dict.fromkeys(LISTED, "ignored"),
}

BESIDE: Mapping[str, Mapping[str, Any]] = {  # what a field needs beside it to mean anything
    "negative_prompt": {"guidance_scale": 1.5},
    **{name: {part.part_of: SAMPLING[part.part_of]} for part in NUMBERS if part.part_of for name in part.names},
    "adaptive_decay": {"adaptive_target": 0.5},
    "xtc_ignore_tokens": {"xtc_probability": 1.0},
    "dry_sequence_breakers": {"dry_multiplier": 0.5},
    **{key: {"dynatemp_range": 0.5} for key in ("dynatemp_exponent", "temp_exponent")},
    "dynamic_temperature": {"dynatemp_low": 0.5, "dynatemp_high": 1.5},
    **{key: {"dynatemp_high": 1.5} for key in ("dynatemp_low", "dynatemp_min", "min_temp")},
    **{key: {"dynatemp_low": 0.5} for key in ("dynatemp_high", "dynatemp_max", "max_temp")},
    "disable_any_whitespace": {"guided_json": SCHEMA},
    "lenient_schema": {"guided_json": {"oneOf": [SCHEMA, {"type": "integer"}]}},
    "tool_choice": {"tools": [TOOL]},
    "best_of": {"do_sample": True},
    "top_logprobs": {"logprobs": True},
    "parallel_tool_calls": {"tools": [TOOL]},
    "stream_options": {"stream": True},
    "top_n_tokens": {"details": True},
    "auto_max_new_tokens": {"max_tokens": 9},
}
