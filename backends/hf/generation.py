"""What is known of a folder's chats: its template, and the marks of turns that have well-known names."""

from pathlib import Path
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.jsonfile import read_object
from tightrope.backends.opened import read_bytes

MAX_FILE = 64 << 20  # bytes; the longest real ones list every added token
MAX_TEMPLATE = 4 << 20  # bytes

# Tokens that end a turn in every family that has them, and tokens that begin one; fine-tunes often flag neither and
# leave them out of generation_config.json. From llama.cpp's list and the files of published models.
TURN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<|endofturn|>",
        "[|endofturn|]",
        "<|END_OF_TURN_TOKEN|>",
        "<end_of_utterance>",
        "<|end▁of▁sentence|>",
        "<｜end▁of▁sentence｜>",
        "<|end_of_sentence|>",
        "<EOT>",
        "▁<EOT>",
        "[EOT]",
        "<eoa>",
        "<eod>",
        "<seed:eos>",
        "[e~[",
    }
)
HARMONY_ENDS = frozenset({"<|return|>", "<|call|>"})  # where they are, <|end|> ends a message within a turn
TURN_STARTS = frozenset(
    {
        "<|im_start|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|header_start|>",
        "<|header_end|>",
        "<start_of_turn>",
        "<|start_of_role|>",
        "<|end_of_role|>",
        "<|START_OF_TURN_TOKEN|>",
        "<|startoftext|>",
        "<|begin_of_text|>",
        "<|begin▁of▁sentence|>",
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|im_middle|>",
        "<|im_system|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "]~b]",
        "<seed:bos>",
    }
)


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object that a folder may lack; empty if it does. Raises BackendError when it is malformed.

    Numbers may be NaN or infinite: a limit such as model_max_length is written so where there is none.
    """
    return read_object(path, MAX_FILE, finite=False) if path.is_file() else {}


def chat_template(folder: Path) -> str | None:
    """Jinja source: chat_template.jinja, or chat_template of tokenizer_config.json or chat_template.json.

    Of several named templates the one called "default", or an only one. None if the folder has no template.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path, MAX_TEMPLATE).decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise BackendError(f"{path}: can't be read as UTF-8 text") from None
    for file in ("tokenizer_config.json", "chat_template.json"):
        value = read_optional(folder / file).get("chat_template")
        if value is not None:
            return _pick(folder / file, value)
    return None


def _pick(path: Path, value: object) -> str | None:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry.get("name"): entry.get("template") for entry in value}
        value = templates.get("default") or (next(iter(templates.values())) if len(templates) == 1 else None)
        if value is None:
            return None
    if not isinstance(value, str):
        raise BackendError(
            f"{path}: chat_template is {value!r:.80}; it must be Jinja source or a list of name, template"
        )
    return value
