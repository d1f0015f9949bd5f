"""The chat templates of a folder, by name: "default" is that of plain chats, "tool_use" that of chats with tools.

As transformers reads them: chat_template.jinja, whatever tokenizer_config.json says, and additional_chat_templates/
NAME.jinja; or else chat_template of tokenizer_config.json, one source or a list of names and sources; or else that of
chat_template.json, which processors have.
"""

import os
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.generation import read_optional
from tightrope.backends.files.opened import read_bytes

MAX_TEMPLATE = 4 << 20  # It is in bytes.
MAX_TEMPLATES = 32  # Models have up to three.

DEFAULT = "default"


def chat_templates(folder: Path) -> dict[str, str]:
    """Jinja sources by name, empty if the folder has none. An only one is the default, whatever its name.

    Raises BackendError for a template that is no text.
    """
    main = folder / "chat_template.jinja"
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(named) > MAX_TEMPLATES:
        raise BackendError(f"{named[0].parent}: holds {len(named)} templates; {MAX_TEMPLATES} are the most")
    templates = {DEFAULT: _read(main)} if os.path.lexists(main) else _in_json(folder)
    templates |= {path.stem: _read(path) for path in named}
    if len(templates) == 1:
        templates.setdefault(DEFAULT, *templates.values())
    return templates


def _read(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEMPLATE).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise BackendError(f"{path}: can't be read as UTF-8 text") from None


def _in_json(folder: Path) -> dict[str, str]:
    for file in ("tokenizer_config.json", "chat_template.json"):
        value = read_optional(folder / file).get("chat_template")
        if value is not None:
            return _sources(folder / file, value)
    return {}


def _sources(path: Path, value: object) -> dict[str, str]:
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in (*value, *value.values())):
        raise BackendError(
            f"{path}: chat_template is {value!r:.80}; it must be Jinja source or a list of name, template"
        )
    if len(value) > MAX_TEMPLATES:
        raise BackendError(f"{path}: chat_template holds {len(value)} templates; {MAX_TEMPLATES} are the most")
    return value
