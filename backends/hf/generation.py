"""What a folder says about generation beside its weights: end tokens, named tokens, the chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.config import ModelShape
from tightrope.backends.hf.jsonfile import read_object
from tightrope.backends.opened import read_bytes

MAX_FILE = 64 << 20  # bytes; the longest real ones list every added token
MAX_TEMPLATE = 4 << 20  # bytes

# Tokens that end a turn in every family that has them; fine-tunes often leave them out of generation_config.json.
TURN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
    }
)


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object that a folder may lack; empty if it does. Raises BackendError when it is malformed."""
    return read_object(path, MAX_FILE) if path.is_file() else {}


def end_ids(folder: Path, shape: ModelShape) -> frozenset[int]:
    """Every eos_token_id of generation_config.json, or of config.json if that file names none.

    Not of both: converters leave another model's id in config.json. Raises BackendError for ids outside the vocabulary.
    """
    path = folder / "generation_config.json"
    value = read_optional(path).get("eos_token_id")
    if value is None:
        path, value = folder / "config.json", shape.raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < shape.vocab_size:
            raise BackendError(
                f"{path}: eos_token_id {token_id!r:.40} is not a token id of the vocabulary of {shape.vocab_size}"
            )
    return frozenset(ids)


def named_token(folder: Path, name: str) -> str | None:
    """The text of a token such as bos_token, by tokenizer_config.json or else special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_optional(folder / file).get(name)
        if isinstance(value, Mapping):  # an added token with its flags
            value = value.get("content")
        if isinstance(value, str):
            return value
        if value is not None:
            raise BackendError(f"{folder / file}: {name} is {value!r:.80}; it must be a token's text")
    return None


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
