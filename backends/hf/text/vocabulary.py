"""A folder's vocabulary: tokenizer.json or else tokenizer.model, joined with what its other files say of tokens."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import SNIFFED, told_by_start
from tightrope.backends.files.generation import HARMONY_ENDS, TURN_ENDS, TURN_STARTS
from tightrope.backends.files.opened import read_bytes
from tightrope.backends.hf.text import sentencepiece
from tightrope.backends.hf.text.charsmap import Charsmap
from tightrope.backends.hf.text.encoders import UnreadableText, encoder, state, token_ids
from tightrope.backends.hf.text.growth import growth_fault
from tightrope.backends.hf.text.token_files import NamedTokens, TokenFiles
from tightrope.backends.plain_text import WORDS

MAX_FILE = 512 << 20  # In bytes. Vocabularies of 256,000 pieces take about 35 MB.
MOST_LEFT_OUT = 0.02  # With a larger share of its pieces left out a vocabulary is another model's.

_CONVERTED = "can't be read: let transformers write it as tokenizer.json, by AutoTokenizer.from_pretrained(FOLDER)"
# (files that stand together, what to do about them)
_OTHER_VOCABULARIES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"vocab.json", "merges.txt"}), f"{_CONVERTED}.save_pretrained(FOLDER)"),
    (frozenset({"spiece.model"}), f"{_CONVERTED}.save_pretrained(FOLDER)"),
    (frozenset({"tekken.json"}), "is of Mistral's own layout, which can't be read: add tokenizer.json"),
    (
        frozenset({"tokenizer.model.v3"}),
        "is of Mistral's own layout: a copy of it named tokenizer.model can be read",
    ),
    (frozenset({"qwen.tiktoken"}), "needs the model's own code: take tokenizer.json from a later model of the family"),
    (frozenset({"tiktoken.model"}), "needs the model's own code: take tokenizer.json from a converted copy on the hub"),
)


@dataclass(slots=True)
class Vocabulary:
    """Pieces and added tokens, by the ids that the model knows them by."""

    path: Path
    source: Tokenizer  # Its own list of added tokens doesn't count.
    pieces: Mapping[str, int]  # Those of its model, with their ids.
    added: dict[int, AddedToken]
    prefixes_space: bool | None = None  # None: `source` puts the space. Else PREFIX asks for it.
    unknown_id: int | None = None
    charsmap: Charsmap | None = None  # Only a sentencepiece file has one.
    named: NamedTokens = field(default_factory=dict)  # Those that the file itself names.
    notes: list[str] = field(default_factory=list)

    def id_of(self, text: str) -> int | None:
        """The id of an added token or a piece."""
        ids = (token_id for token_id, token in self.added.items() if token.content == text)
        return next(ids, self.pieces.get(text))

    def turn_ends(self) -> set[int]:
        """Added tokens that end a turn by their well-known names."""
        texts = {token.content: token_id for token_id, token in self.added.items()}
        ends = TURN_ENDS - {"<|end|>"} if texts.keys() >= HARMONY_ENDS else TURN_ENDS
        return {token_id for text, token_id in texts.items() if text in ends}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's file, right or not."""
    return any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model"))


def read_vocabulary(folder: Path, vocab_size: int, files: TokenFiles) -> Vocabulary:
    """The vocabulary, with tokens of ids below `vocab_size` alone.

    Raises BackendError when the folder has no tokenizer, a malformed one, or one of another model.
    """
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        vocabulary = _from_json(path, vocab_size)
    else:
        path = folder / "tokenizer.model"
        if not os.path.lexists(path):
            raise BackendError(f"{folder}: holds neither tokenizer.json nor tokenizer.model; {_what_to_do(folder)}")
        vocabulary = _from_sentencepiece(path, vocab_size, files)
    try:
        _Join(vocabulary, files, vocab_size).run()
    except UnreadableText as error:
        raise BackendError(f"{path}: {error}") from None
    return vocabulary


def _what_to_do(folder: Path) -> str:
    """Where a tokenizer.json comes from, if the folder has a vocabulary of another kind."""
    there = {path.name for path in folder.iterdir()}
    for names, origin in _OTHER_VOCABULARIES:
        if names <= there:
            return f"{' and '.join(sorted(names))} {origin}"
    return "copy the model's tokenizer too"


def _from_json(path: Path, vocab_size: int) -> Vocabulary:
    raw = read_bytes(path, MAX_FILE)
    try:
        source = Tokenizer.from_buffer(raw)
    except Exception as error:  # The library raises plain Exception for all that can be wrong with a file.
        told = told_by_start(raw[:SNIFFED], len(raw), is_json=True) or f"{' '.join(str(error).split()):.200}"
        raise BackendError(f"{path}: not a tokenizer of the tokenizers library: {told}") from None
    fault = growth_fault(state(source.normalizer))
    if fault is not None:
        raise BackendError(f"{path}: {fault}")
    added = _added(raw)
    pieces = source.get_vocab(with_added_tokens=False)
    if not pieces:
        raise BackendError(f"{path}: its vocabulary is empty; copy the model's own tokenizer.json")
    texts = {token.content for token in added.values()}
    foreign = {text: i for text, i in pieces.items() if i >= vocab_size and text not in texts}
    notes = _check_foreign(path, foreign, len(pieces), vocab_size)
    if any(i >= vocab_size for i in pieces.values()):
        whole = json.loads(raw)
        source = Tokenizer.from_str(json.dumps(whole | {"model": _cut(whole["model"], vocab_size), "added_tokens": []}))
        pieces = source.get_vocab(with_added_tokens=False)
    source.no_padding()  # Such settings are of the training run.
    source.no_truncation()
    # A unigram model doesn't tell it.
    unknown_id = json.loads(raw)["model"].get("unk_id") if isinstance(source.model, Unigram) else None
    if isinstance(source.model, BPE) and source.model.unk_token is not None:
        unknown_id = pieces.get(source.model.unk_token)
    return Vocabulary(path, source, pieces, added, unknown_id=unknown_id, notes=notes)


def _added(raw: bytes) -> dict[int, AddedToken]:
    """The added tokens of a file that the library could read, by the ids that the file states.

    The library gives them the ids that follow the pieces, in the order in which they are listed. A large vocabulary is
    most of such a file and takes seconds to read, so that the list alone is read.
    """
    found = re.search(rb'"added_tokens"\s*:\s*(?=\[)', raw)
    entries = json.JSONDecoder().raw_decode(raw[found.end() :].decode("utf-8", errors="replace"))[0] if found else []
    return {
        entry["id"]: AddedToken(**{name: value for name, value in entry.items() if name != "id"}) for entry in entries
    }


def _check_foreign(path: Path, foreign: Mapping[str, int], num_pieces: int, vocab_size: int) -> list[str]:
    """Notes on pieces that the model has no rows for. Raises BackendError when they are too many."""
    if not foreign:
        return []
    text, last = max(foreign.items(), key=lambda item: item[1])
    if len(foreign) > MOST_LEFT_OUT * num_pieces:
        raise BackendError(
            f"{path}: token {text!r} has id {last}, but vocab_size in config.json is {vocab_size}; "
            "tokenizer and model must belong together"
        )
    return [f"{text!r} (id {i})" for text, i in sorted(foreign.items(), key=lambda item: item[1])]


def _cut(model: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A model's JSON without pieces that have ids from `vocab_size` on, and without the merges that give them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {**model, "vocab": vocab[:vocab_size]}
    kept = {text: i for text, i in vocab.items() if i < vocab_size}
    merges = []
    for merge in model.get("merges", []):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left in kept and right in kept and left + right in kept:
            merges.append(merge)
    return {**model, "vocab": kept, "merges": merges}


def _from_sentencepiece(path: Path, vocab_size: int, files: TokenFiles) -> Vocabulary:
    model = sentencepiece.read_sentencepiece(path)
    added = sentencepiece.added(model)
    foreign = {p.text: i for i, p in enumerate(model.pieces) if i >= vocab_size and i not in added}
    notes = _check_foreign(path, foreign, len(model.pieces), vocab_size)
    unknown_id = model.unknown_id
    names = (("bos_token", model.bos_id), ("eos_token", model.eos_id), ("unk_token", unknown_id))
    named: NamedTokens = {
        name: model.pieces[i].text for name, i in names if 0 <= i < min(len(model.pieces), vocab_size)
    }
    if len(model.pieces) > vocab_size > unknown_id:
        model = replace(model, pieces=model.pieces[:vocab_size])
    # The file's own word, unless the settings have one: transformers' llamas prefix a space whatever the file says.
    prefixes = files.settings.get("add_prefix_space")
    prefixes_space = prefixes if isinstance(prefixes, bool) else model.prefixes_space
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    return Vocabulary(
        path, sentencepiece.build(model), ids, added, prefixes_space, unknown_id, model.charsmap, named, notes
    )


class _Join:
    """Adds the tokens and flags of the other files to a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, files: TokenFiles, vocab_size: int) -> None:
        self._vocabulary = vocabulary
        self._files = files
        self._vocab_size = vocab_size
        self._pieces = vocabulary.pieces
        self._texts = {i: text for text, i in self._pieces.items()}
        self._tokens: dict[str, tuple[int | None, AddedToken]] = {}  # By text; None stands for the next free id.
        self._plain: Callable[[str], list[int]] | None = None
        self._left_out: list[str] = list(vocabulary.notes)

    def run(self) -> None:
        """Later statements win for flags, and none takes the special flag away; a text that has an id keeps it."""
        files = self._files
        for token_id, token in self._vocabulary.added.items():
            self._state(token, token_id)
        for token_id, token in files.decoder.items():
            self._state(self._raw(token), token_id)
        for text, token_id in files.listed.items():
            if text not in self._tokens:
                self._state(AddedToken(text, normalized=False, special=False), token_id)
        for text, token in files.special.items():
            if text in self._tokens or not self._is_word(text):
                self._state(self._raw(self._tokens.get(text, (None, token))[1]), None, special=True)
        for text in TURN_ENDS | TURN_STARTS:
            if text in self._tokens:
                self._state(self._tokens[text][1], None, special=True)
            elif text in self._pieces and not self._is_word(text):
                self._state(AddedToken(text, normalized=False, special=True), None)
        for text in [text for text, (token_id, _) in self._tokens.items() if token_id in files.end_ids]:
            if not WORDS.fullmatch(text):  # What ends a turn is no text, even if its id alone is named.
                self._state(self._tokens[text][1], None, special=True)
        self._vocabulary.added = self._by_id()
        self._vocabulary.notes = self._notes()

    def _raw(self, token: AddedToken) -> AddedToken:
        """A token of another file; over a sentencepiece file it is looked for in the text as it is, whatever its flag.

        So it is in transformers, in both of its tokenizers over such files: normalized, what is looked for would begin
        with a space. Pieces of spaces are found in the normalized text alone.
        """
        if self._vocabulary.prefixes_space is None:
            return token
        before = self._tokens.get(token.content)
        return AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=before is not None and before[1].normalized and "▁" in token.content,
            special=token.special,
        )

    def _state(self, token: AddedToken, token_id: int | None, *, special: bool = False) -> None:
        text = token.content
        before = self._tokens.get(text)
        if before is not None:
            token_id = before[0] if before[0] is not None else token_id
            special = special or before[1].special
        token.special = token.special or special
        self._tokens[text] = self._pieces.get(text, token_id), token

    def _is_word(self, text: str) -> bool:
        """Whether plain text gives this piece by itself, so that making it special would tear words out of texts.

        Some models name "!" or a word as their padding.
        """
        token_id = self._pieces.get(text)
        if token_id is None:
            return False
        if self._plain is None:
            tokenizer = encoder(self._vocabulary.source, (), prefixed=False, parse_special=False)
            self._plain = lambda text: token_ids(tokenizer, text)
        return self._plain(text) == [token_id]

    def _by_id(self) -> dict[int, AddedToken]:
        found: dict[int, AddedToken] = {}
        new: list[AddedToken] = []
        for text, (token_id, token) in self._tokens.items():
            if token_id is None:
                new.append(token)
            elif not 0 <= token_id < self._vocab_size:
                self._left_out.append(f"{text!r:.60} (id {token_id})")
            elif self._is_taken(text, token_id):
                self._left_out.append(f"{text!r:.60} (id {token_id}, which is the word {self._texts[token_id]!r:.40})")
            elif text not in self._files.listed or token_id not in found:
                found[token_id] = token
        last = max(
            [*found, *self._pieces.values(), *(i for i, _ in self._tokens.values() if i is not None)], default=-1
        )
        for token_id, token in enumerate(new, last + 1):
            if token_id < self._vocab_size:
                found[token_id] = token
            else:
                self._left_out.append(f"{token.content!r:.60} (named, and without an id)")
        return dict(sorted(found.items()))

    def _is_taken(self, text: str, token_id: int) -> bool:
        """Whether the id is a word's; a place that was held free may get another name."""
        piece = self._texts.get(token_id)
        return piece is not None and piece != text and piece not in self._tokens and self._is_word(piece)

    def _notes(self) -> list[str]:
        if not self._left_out:
            return []
        names = ", ".join(self._left_out[:5]) + (f" and {len(self._left_out) - 5} more" if self._left_out[5:] else "")
        return [f"{self._vocabulary.path}: left out, as the model has ids 0 to {self._vocab_size - 1}: {names}"]
