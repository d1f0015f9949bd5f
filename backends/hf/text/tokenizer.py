"""Text to token ids and back by a Hugging Face folder's tokenizer.json or tokenizer.model."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.text.encoders import UnreadableText, encoder, token_ids
from tightrope.backends.hf.text.piece_bytes import max_token_bytes
from tightrope.backends.hf.text.pieces import BYTE_PIECE, byte_level, piece_reader
from tightrope.backends.hf.text.sentencepiece import NO_PREFIX, PREFIX
from tightrope.backends.hf.text.token_files import TokenFiles, read_token_files
from tightrope.backends.hf.text.vocabulary import read_vocabulary
from tightrope.backends.plain_text import MarkCutter, place_to_cut
from tightrope.backends.protocol import MAX_ADDED_TEXTS

_ORDINARY = "The ferry left at seven, when the harbour was still grey."  # Every tokenizer reads this text.


class HFTokenizer:
    """Tokenizer over the tokenizers library, whose objects don't change after the start, so that threads share them.

    Two switches need objects of their own, which share one vocabulary: whether special tokens are recognised, and
    whether the text gets the space that a sentencepiece vocabulary puts in front of a prompt.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Raises BackendError when the folder has no tokenizer, a malformed one, or another model's."""
        files = read_token_files(folder, shape)
        self._vocabulary = read_vocabulary(folder, shape.vocab_size, files)
        self.vocab_size = shape.vocab_size
        self._bytes = piece_reader(self._vocabulary.source, self._vocabulary.path)
        self._prefixes_parts = _prefixes_parts(files)
        self.notes: tuple[str, ...] = (*files.notes, *self._vocabulary.notes)
        self._pieces = self._vocabulary.pieces
        try:
            self._build()
            self.bos_id, self.adds_bos = self._bos(files, shape)
            self.encode(_ORDINARY, parse_special=True, is_start=True)
        except UnreadableText as error:
            raise BackendError(f"{self._vocabulary.path}: {error}") from None
        self.eos_ids: frozenset[int] = self._ends(files)
        self.lost_bytes, self.max_token_bytes = self._measure()
        own = {name: text for name, text in self._vocabulary.named.items() if name not in files.settings}
        self.named_tokens = tuple((own | files.named).items())

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        """See Tokenizer. An unpaired surrogate, which has no UTF-8, becomes a question mark."""
        if not text:
            return []
        if not text.isascii():
            text = text.encode("utf-8", errors="replace").decode("utf-8")
        first, *others = self._cutters[parse_special].pieces(text)
        token_ids = self._encode(first, parse_special=parse_special, is_start=is_start)
        for piece in others:
            token_ids += self._encode(piece, parse_special=parse_special, is_start=False)
        return token_ids

    def _encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        if self._vocabulary.charsmap is not None:
            kept = self._kept[parse_special]
            parts = [text] if kept is None else kept.split(text)  # Text and added tokens take turns.
            parts[::2] = map(self._vocabulary.charsmap.replace, parts[::2])
            text = "".join(parts)
        if self._vocabulary.prefixes_space is not None:
            text = self._with_marks(text, parse_special=parse_special, is_start=is_start)
        tokenizer = self._encoders[is_start, parse_special]
        ids = token_ids(tokenizer, text)
        if self._own_ids:
            return [self._own_ids.get(token_id, token_id) for token_id in ids]
        return ids

    def _with_marks(self, text: str, *, parse_special: bool, is_start: bool) -> str:
        """The text of a sentencepiece vocabulary with PREFIX where it puts a space: at its start, unless that is an
        added token, and, in vocabularies of the first years, behind each added token.

        The other parts begin with NO_PREFIX where the text itself holds such characters.
        """
        usual = NO_PREFIX if PREFIX in text or NO_PREFIX in text else ""
        prefix = PREFIX if self._vocabulary.prefixes_space else usual
        finds = self._finds[parse_special]
        if finds is None or not (usual or self._prefixes_parts):
            is_marked = is_start and (finds is None or not finds.match(text))
            return (prefix if is_marked else usual) + text
        parts = finds.split(text)  # Text and added tokens take turns.
        behind = prefix if self._prefixes_parts else usual
        begins = [prefix if is_start else usual, *[behind] * (len(parts) // 2)]
        parts[::2] = [begin + part if part else part for begin, part in zip(begins, parts[::2], strict=True)]
        return "".join(parts)

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer. An id that the model has and the vocabulary lacks adds nothing."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read_token(token_id)
        return known

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_texts(self) -> Sequence[str]:
        """Special tokens. Others that were added, such as runs of spaces, are plain text and always found."""
        return self._special_texts

    def added_texts(self) -> Sequence[str]:
        """See Tokenizer."""
        found = (token.content for token in self._vocabulary.added.values() if not token.special)
        texts = [text for text in found if text.replace("▁", " ").strip() and not BYTE_PIECE.fullmatch(text)]
        return texts[:MAX_ADDED_TEXTS]

    def set_marks(self, marks: Collection[str], ends: Collection[str]) -> None:
        """See Tokenizer."""
        wanted = set(marks).intersection(self.added_texts())
        for token in self._vocabulary.added.values():
            if token.content in wanted:
                token.special = True
        self._build()
        self.eos_ids |= {i for i in self._special if self._vocabulary.added[i].content in set(ends)}

    def _build(self) -> None:
        """Make the encoders, and list what is special by the flags of the added tokens."""
        vocabulary, added = self._vocabulary, self._vocabulary.added
        self._encoders = {
            (is_start, parse_special): encoder(
                vocabulary.source, added.values(), prefixed=is_start, parse_special=parse_special
            )
            for is_start in (True, False)
            for parse_special in (True, False)
        }
        whole = self._encoders[True, True]
        # The library gives these ids where the files have others.
        ids = {whole.token_to_id(token.content): token_id for token_id, token in added.items()}
        self._own_ids = {given: token_id for given, token_id in ids.items() if given != token_id}
        if self._own_ids.keys() & set(self._pieces.values()):
            raise BackendError(f"{vocabulary.path}: its vocabulary has fewer pieces than ids; copy it again")
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._special_texts = tuple(added[i].content for i in sorted(self._special))
        raw = [] if vocabulary.prefixes_space is None else [token for token in added.values() if not token.normalized]
        kept = [] if vocabulary.charsmap is None else added.values()
        switch = (True, False)
        self._finds = {parse_special: _finds(raw, parse_special=parse_special) for parse_special in switch}
        self._kept = {parse_special: _finds(kept, parse_special=parse_special) for parse_special in switch}
        self._known: dict[int, bytes] = {}  # It is filled as tokens are seen.
        named_bytes = (f"<0x{byte:02X}>" for byte in range(256))
        bytes_ids = {text: self._pieces[text] for text in named_bytes if text in self._pieces}
        # All but the unknown one, which stands for any letter.
        marks = {added[i].content: i for i in self._special if i != vocabulary.unknown_id}
        self._cutters = {True: self._cutter(bytes_ids), False: self._cutter(bytes_ids | marks)}

    def _cutter(self, ids: Mapping[str, int]) -> MarkCutter:
        """Cuts texts of tokens that the vocabulary would make of plain letters, such as the name of a byte's piece."""

        def plain(text: str) -> list[int]:
            return self._encode(text, parse_special=False, is_start=False)

        places = ((text, place_to_cut(text, token_id, plain)) for text, token_id in ids.items())
        return MarkCutter({text: place for text, place in places if place is not None})

    def _read_token(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        added = self._vocabulary.added.get(token_id)
        if added is not None and (added.special or self._bytes is byte_level):
            return added.content.encode()
        piece = self._vocabulary.source.model.id_to_token(token_id) if added is None else added.content
        return b"" if piece is None else self._bytes(piece)

    def _measure(self) -> tuple[bytes, int | None]:
        """`lost_bytes` and `max_token_bytes`, see Tokenizer."""
        vocabulary, added = self._vocabulary, self._vocabulary.added.values()
        if vocabulary.charsmap is not None or any(token.lstrip or token.rstrip for token in added):
            return b"", None
        texts = [*self._pieces, *(token.content for token in added)]
        longest = max_token_bytes(vocabulary.source, texts)
        if self._bytes is not byte_level:
            return b"", longest
        known = {byte_level(text) for text in self._pieces if len(text) == 1}
        return bytes(byte for byte in range(256) if bytes([byte]) not in known), longest

    def _bos(self, files: TokenFiles, shape: ModelShape) -> tuple[int | None, bool]:
        """BOS and whether prompts start with it: as tokenizer_config.json says, or else as the post-processor does."""
        vocabulary = self._vocabulary
        named = files.named.get("bos_token") or vocabulary.named.get("bos_token")
        bos = vocabulary.id_of(named) if isinstance(named, str) else None
        if bos is None:
            given = shape.raw.get("bos_token_id")
            bos = given if type(given) is int and 0 <= given < self.vocab_size else None
        first = token_ids(vocabulary.source, "a", add_special_tokens=True)[:1]
        added = first != token_ids(vocabulary.source, "a")[:1] and first[0] in self._special
        asked = files.settings.get("add_bos_token")
        if added and asked is not False:
            return first[0], True
        if isinstance(asked, bool):
            return bos, asked and bos is not None
        # A sentencepiece file without the setting is a llama's, from before there was one.
        return bos, bos is not None and vocabulary.prefixes_space is not None

    def _ends(self, files: TokenFiles) -> frozenset[int]:
        """Every token that a file names as an end, whatever its flags, and those that are known by name."""
        vocabulary = self._vocabulary
        own = vocabulary.named.get("eos_token")
        texts = files.end_texts or ({own} if isinstance(own, str) else set())
        named = {vocabulary.id_of(text) for text in texts}
        ends = {i for i in named if i is not None} | vocabulary.turn_ends() | files.end_ids
        # Transformers writes the default of a config class where nobody gave an end.
        return frozenset(ends - (files.default_end_ids - named - self._special - vocabulary.added.keys()))


def _prefixes_parts(files: TokenFiles) -> bool:
    """Whether each part of a text between added tokens gets a space, or only the whole text.

    `legacy` of tokenizer_config.json says it, or else the class, whose defaults are transformers'.
    """
    legacy = files.settings.get("legacy")
    if isinstance(legacy, bool):
        return legacy
    return str(files.settings.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer"


def _finds(added: Iterable[AddedToken], *, parse_special: bool) -> re.Pattern[str] | None:
    """Finds added tokens in a text, with the blanks that they take in; None if there are none."""
    texts = []
    for token in sorted(added, key=lambda token: -len(token.content)):
        if parse_special or not token.special:
            before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
            word = rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
            texts.append(f"{before}{word}{after}")
    return re.compile(f"({'|'.join(texts)})") if texts else None
