"""Fields that a route does not read, and whose loss would change the answer: they are refused there, by name.

One table for all dialects, since a name means the same to nearly all servers that have it. What a route reads never
comes here, so a name stands here until every route reads it. Other unread fields change nothing, and are listed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tightrope.engine.errors import InvalidRequest
from tightrope.server.fields import structured
from tightrope.server.fields.names import GUIDANCE_SCALES, NOT_BUILT, STEERING, Ignored


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a field is refused. `neutral` are values that ask for nothing, besides null, false, 0 and empty ones."""

    why: str
    neutral: tuple[object, ...] = ()


_NO_FIELD = "is no field of this route, and the answer would be another one without it"
_BESIDE = "its fields are read beside the others, in the body itself"
_IN_FRONT = "nothing is put in front of a prompt by this route; write it into the prompt or the messages"
_TEMPLATE = "a chat template is taken from the model or the server's settings, never from a request"
_VARIABLE = "variables of the chat template are given in chat_template_kwargs, on /v1/chat/completions"
_MIDDLE = "it needs a model that fills in the middle, which this one does not"
_TEXT_ALONE = "it needs another kind of model than this one, which takes and writes text alone"
_TOOLS = "tools are served by the routes of chats, under the names tools and tool_choice"
_ADAPTER = "an adapter is named as the request's model, or on /generate as adapter_id"
_KEPT_THERE = "presets, characters and chat modes are files of text-generation-webui, which this server does not have"
_LAST_TURN = "a turn is gone on with by continue_final_message, on /v1/chat/completions"
_ONE_ANSWER = "this route gives one answer"
_MARKED = "texts are marked on /generate, by its parameter watermark"
_NOT_BUILT = "it is not supported by this server"

LOST: Mapping[str, Lost] = {
    **dict.fromkeys(("memory", "system", "system_prompt", "instructions", "soft_prompt"), Lost(_IN_FRONT)),
    **dict.fromkeys(("context", "prompt", "content", "inputs", "messages", "parameters"), Lost(_NO_FIELD)),
    **dict.fromkeys(("extra_body", "options", "sampling_params", "generation_config"), Lost(_BESIDE)),
    **dict.fromkeys(("chat_template", "chat_template_str", "template", "prompt_template"), Lost(_TEMPLATE)),
    **dict.fromkeys(("instruction_template", "instruction_template_str", "tool_prompt"), Lost(_TEMPLATE)),
    **dict.fromkeys(("chat_template_kwargs", "template_vars", "guideline"), Lost(_VARIABLE)),
    **dict.fromkeys(("suffix", "input_prefix", "input_suffix", "input_extra"), Lost(_MIDDLE)),
    **dict.fromkeys(("image", "images", "image_data", "audio", "videos", "multimodal_data"), Lost(_TEXT_ALONE)),
    "modalities": Lost(_TEXT_ALONE, (["text"],)),
    **dict.fromkeys(("tools", "functions", "tool_calls", "tool_name"), Lost(_TOOLS)),
    **dict.fromkeys(("tool_choice", "function_call"), Lost(_TOOLS, ("none", "auto"))),
    **dict.fromkeys(("adapter", "adapter_id", "adapter_name", "adapters"), Lost(_ADAPTER)),
    **dict.fromkeys(("lora", "loras", "lora_id", "lora_name", "lora_names", "lora_path"), Lost(_ADAPTER)),
    **dict.fromkeys(("lora_request", "lora_adapter", "lora_adapters"), Lost(_ADAPTER)),
    **dict.fromkeys(("preset", "character", "greeting", "user_bio", "impersonate"), Lost(_KEPT_THERE)),
    "chat_instruct_command": Lost(_KEPT_THERE),
    "mode": Lost(_KEPT_THERE, ("instruct",)),
    **dict.fromkeys(("continue_", "response_prefix", "prefix", "partial"), Lost(_LAST_TURN)),
    **dict.fromkeys(("n", "n_cmpl", "best_of", "num_return_sequences"), Lost(_ONE_ANSWER, (1,))),
    "echo": Lost(_NO_FIELD),
    **dict.fromkeys(structured.NAMES, Lost(_NO_FIELD, ({"type": "text"},))),
    **dict.fromkeys(STEERING, Lost(_NO_FIELD)),
    **dict.fromkeys(GUIDANCE_SCALES, Lost(_NO_FIELD, (1,))),
    **dict.fromkeys(("guided_whitespace_pattern", "guided_decoding", "structural_tag"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("regex", "ebnf"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("grammar_lazy", "grammar_triggers", "grammar_retain_state"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("stop_regex", "bad_words_ids", "logits_processors", "logit_bias_exp"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("bypass_eos", "no_stop_trim", "token_healing", "n_indent"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("t_max_predict_ms", "repetition_detection", "vllm_xargs"), Lost(_NOT_BUILT)),
    **{name: Lost(why, (neutral,)) for name, (neutral, why) in NOT_BUILT.items()},
    "use_beam_search": Lost(_NOT_BUILT),
    **dict.fromkeys(("watermark", "watermarking"), Lost(_MARKED)),
    **dict.fromkeys(("documents", "prompt_embeds", "mcp_servers"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("web_search_options", "think", "thinking_token_budget", "thinking_budget"), Lost(_NOT_BUILT)),
    **dict.fromkeys(("logprob_token_ids", "post_sampling_probs"), Lost(_NOT_BUILT)),
    "truncation_side": Lost("a prompt that is cut keeps its end", ("left",)),
}


def refuse_lost(unread: Iterable[tuple[str, str, object]]) -> None:
    """Raise InvalidRequest for the first of the unread fields, by path, name and value, that asks for something."""
    for path, name, value in unread:
        lost = LOST.get(name)
        if lost is not None and not (_is_empty(value) or value in lost.neutral):
            raise InvalidRequest(f"{path}: {lost.why}", path)


def idle_scale(scale: float, adapter: str | None) -> list[Ignored]:
    """The scale of an adapter, to be listed where none is named."""
    return [("adapter_scale", "no adapter is named")] if adapter is None and scale != 1 else []


def _is_empty(value: object) -> bool:
    """Whether a value asks for nothing under any name; texts of no length in a list are none."""
    return not value or (isinstance(value, list) and not any(value))
