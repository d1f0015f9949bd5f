"""What the files beside a vocabulary say about its tokens: added ones, names, flags, and which end a turn.

tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and config.json make one
statement together with the vocabulary's own file. They are joined as transformers 5 joins them
(PreTrainedTokenizerBase._from_pretrained): names in special_tokens_map.json win over those in tokenizer_config.json
unless the latter lists all added tokens in `added_tokens_decoder`. Unlike there, nothing is unread: a name or a token
that only one file knows counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tightrope.backends.errors import BackendError
from tightrope.backends.files.generation import read_optional
from tightrope.backends.files.hf_config import ModelShape

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
END_NAMES = ("eos_token", "eot_token", "eom_token")
# names before transformers 5, and since
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# Config classes fill these in; in a vocabulary without marks at its start they are words.
_DEFAULT_END_IDS = (1, 2)

NamedTokens = dict[str, str | tuple[str, ...]]


@dataclass(slots=True)
class TokenFiles:
    """The joined statement, before it meets a vocabulary."""

    settings: Mapping[str, Any]  # What tokenizer_config.json says.
    decoder: dict[int, AddedToken] = field(default_factory=dict)  # Added tokens with their flags.
    listed: dict[str, int] = field(default_factory=dict)  # Added tokens by name alone.
    named: NamedTokens = field(default_factory=dict)  # By the names that templates call them.
    special: dict[str, AddedToken] = field(default_factory=dict)  # Every token that has a name.
    end_texts: frozenset[str] = frozenset()
    end_ids: frozenset[int] = frozenset()
    default_end_ids: frozenset[int] = frozenset()  # They may be nothing but a config class's default.
    notes: list[str] = field(default_factory=list)


def read_token_files(folder: Path, shape: ModelShape) -> TokenFiles:
    """Read and join the files, any of which may be missing.

    Raises BackendError when tokenizer_config.json is malformed, or another holds what can't be about tokens. What is
    about tokens that the model lacks is left out with a note.
    """
    path = folder / "tokenizer_config.json"
    files = TokenFiles(read_optional(path))
    files.decoder = _decoder(path, files.settings)
    files.listed = _listed(folder / "added_tokens.json", files.notes)
    map_path = folder / "special_tokens_map.json"
    named, mapped = _named(path, files.settings), _named(map_path, _advice(map_path, files.notes))
    ends = {text for source in (named, mapped) for name in END_NAMES for text in _texts(source.get(name, ()))}
    joined = mapped | named if "added_tokens_decoder" in files.settings else named | mapped
    lists = [tokens for source in (named, mapped) if isinstance(tokens := source.get(_LISTS[0]), tuple)]
    if lists:
        joined[_LISTS[0]] = tuple({token.content: token for tokens in lists for token in tokens}.values())
    for tokens in (joined[name] for name in sorted(joined, key=_place)):
        for token in tokens if isinstance(tokens, tuple) else (tokens,):
            files.special.setdefault(token.content, token)
    for name, tokens in joined.items():
        texts = _texts(tokens)
        files.named[name] = texts if isinstance(tokens, tuple) else texts[0]
    files.end_texts = frozenset(ends)
    _read_end_ids(folder, shape, files)
    return files


def _place(name: str) -> int:
    """When transformers gives ids to the tokens of a name, which have none of their own: lists come last."""
    last = len(NAMES) + (name == _LISTS[0])
    return NAMES.index(name) if name in NAMES else last


def _advice(path: Path, notes: list[str]) -> dict[str, Any]:
    """A file whose loss costs no more than what it says; empty, with a note, if it is no JSON object."""
    try:
        return read_optional(path)
    except BackendError as error:
        notes.append(f"left out: {error}")
        return {}


def _decoder(path: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        return {}
    if not isinstance(listed, dict):
        raise BackendError(f"{path}: added_tokens_decoder is {listed!r:.80}; it must map ids to tokens")
    tokens = {}
    for key, value in listed.items():
        if not key.isdecimal() or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise BackendError(
                f"{path}: added_tokens_decoder of {key!r:.40} must be an object with content, under an id"
            )
        tokens[int(key)] = _token(value, special=value.get("special") is True)
    return tokens


def _token(value: str | Mapping[str, Any], *, special: bool) -> AddedToken:
    """A token with the flags that are stated; unstated ones as transformers has them."""
    if isinstance(value, str):
        value = {"content": value}
    flags = {name: value[name] is True for name in _FLAGS if name in value}
    return AddedToken(_encodable(value["content"]), special=special, **{"normalized": not special} | flags)


def _encodable(text: str) -> str:
    """The text with unpaired surrogates replaced, which no vocabulary can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _listed(path: Path, notes: list[str]) -> dict[str, int]:
    listed = _advice(path, notes)
    for content, token_id in listed.items():
        if type(token_id) is not int:
            raise BackendError(f"{path}: the id of {content!r:.40} is {token_id!r:.40}; it must be a whole number")
    return {_encodable(content): token_id for content, token_id in listed.items()}


def _named(path: Path, values: Mapping[str, Any]) -> dict[str, AddedToken | tuple[AddedToken, ...]]:
    """Tokens by name. Lists become `additional_special_tokens`, whichever of their names they have."""
    named: dict[str, AddedToken | tuple[AddedToken, ...]] = {}
    for name, value in values.items():
        if name in _LISTS and isinstance(value, list):
            items = [_token(item, special=True) for item in value if _is_token(item)]
            if items:
                named[_LISTS[0]] = tuple(items)
        elif name in _LISTS and isinstance(value, dict):
            named |= {key: _token(item, special=True) for key, item in value.items() if _is_token(item)}
        elif name.endswith("_token") and not name.startswith("add_") and _is_token(value):
            named[name] = _token(value, special=True)
        elif name in NAMES and value not in (None, ""):
            raise BackendError(f"{path}: {name} is {value!r:.80}; it must be a token's text")
    return named


def _is_token(value: object) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return isinstance(content, str) and bool(content)


def _texts(tokens: AddedToken | tuple[AddedToken, ...]) -> tuple[str, ...]:
    return tuple(token.content for token in (tokens if isinstance(tokens, tuple) else (tokens,)))


def _read_end_ids(folder: Path, shape: ModelShape, files: TokenFiles) -> None:
    """Every eos_token_id of generation_config.json and config.json that is an id of the model."""
    config, path = folder / "config.json", folder / "generation_config.json"
    generation = _ids(path, _advice(path, files.notes).get("eos_token_id"), shape.vocab_size, files.notes)
    files.end_ids = generation | _ids(config, shape.raw.get("eos_token_id"), shape.vocab_size, files.notes)
    defaults = files.end_ids.intersection(_DEFAULT_END_IDS) - generation
    if files.end_ids - defaults:
        files.default_end_ids = defaults


def _ids(path: Path, value: object, vocab_size: int, notes: list[str]) -> frozenset[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    values = [int(i) if type(i) is float and i.is_integer() else i for i in values]
    ids = frozenset(i for i in values if type(i) is int and 0 <= i < vocab_size)
    foreign = [i for i in values if type(i) is not int or i not in ids]
    if foreign:
        names = ", ".join(f"{i!r:.40}" for i in foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        notes.append(f"{path}: eos_token_id {names} left out: ids of the model are 0 to {vocab_size - 1}")
    return ids
