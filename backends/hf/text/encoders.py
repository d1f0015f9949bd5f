"""Tokenizers over one vocabulary that differ in what they recognise and in what they put in front of a text."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tightrope.backends.errors import BackendError


def encoder(source: Tokenizer, added: Iterable[AddedToken], *, prefixed: bool, parse_special: bool) -> Tokenizer:
    """A tokenizer over the vocabulary of `source` that recognises `added`, flagged ones if `parse_special`.

    Without `prefixed` it leaves out what puts a space in front of the text.
    """
    tokenizer = Tokenizer(source.model)
    if prefixed:
        tokenizer.normalizer, tokenizer.pre_tokenizer = source.normalizer, source.pre_tokenizer
    else:
        # Only a whole tokenizer can be made of JSON.
        parts = {"normalizer": state(source.normalizer), "pre_tokenizer": state(source.pre_tokenizer)}
        empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        bare = Tokenizer.from_str(json.dumps(empty | {name: _without_prefix(part) for name, part in parts.items()}))
        tokenizer.normalizer, tokenizer.pre_tokenizer = bare.normalizer, bare.pre_tokenizer
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


class UnreadableText(BackendError):
    """A tokenizer gives up on a text."""


def token_ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text. Raises UnreadableText.

    The fast call leaves offsets out, and releases the interpreter's lock.
    """
    try:
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except BaseException as error:
        # A pattern that takes too many tries panics in Rust, which is no Exception here, and its class has no module.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = " ".join(str(error).split())
        raise UnreadableText(f"the model's tokenizer gives up on this text: {reason:.200}") from None
    return ids


def state(part: Any) -> Any:  # noqa: ANN401 - any part of a tokenizer, and its JSON
    """The JSON of a part of a tokenizer."""
    return None if part is None else json.loads(part.__getstate__())


def _without_prefix(part: Any) -> Any:  # noqa: ANN401 - JSON
    """A normalizer or pre-tokenizer without what puts a space in front of the text."""
    if not isinstance(part, dict):
        return part
    lists = {key: [_without_prefix(p) for p in part[key]] for key in ("normalizers", "pretokenizers") if key in part}
    for key, steps in lists.items():
        lists[key] = [step for step in steps if step is not None]
    kind = part["type"]
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part | lists
