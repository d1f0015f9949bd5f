"""Special tokens in a text, cut out by us: llama.cpp's own ids, in time that grows with the text's length."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from gguf import TokenType
from gguf_files import Token, write_vocabulary
from gguf_models import gemma
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll
from test_gguf_marks import BYTES, PIECES, WORDS

from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.gguf.special_tokens import SpecialToken, SpecialTokens
from tightrope.backends.gguf.tokenizer import GGUFTokenizer
from tightrope.backends.locate import bundled_model

CONTROL, USER = TokenType.CONTROL, TokenType.USER_DEFINED
# overlapping each other and themselves in most ways, some of one length, with blanks at their edges
TANGLED: list[Token] = [
    ("ab", CONTROL),
    ("ba", USER),
    ("aab", USER),
    ("abab", CONTROL),
    ("bcd", USER),
    ("cda", CONTROL),
    ("dab", USER),
    ("a", USER),
    ("aa", USER),
    ("aaa", USER),
    ("aaaa", CONTROL),
    ("b<|", CONTROL),
    ("<|c|>", CONTROL),
    ("|>d", USER),
    (" d", USER),
    ("d ", CONTROL),
    ("  ", USER),
    ("é", USER),
    ("cé", CONTROL),
    ("éb", CONTROL),
]
ALPHABET = ["a", "b", "c", "d", "é", " ", "\n", "<|", "|>", *(text for text, _ in TANGLED)]


def own_ids(model: NativeModel, text: str, *, parse_special: bool) -> list[int]:
    """What llama.cpp makes of the whole text."""
    raw = text.encode()
    out = (ctypes.c_int32 * (3 * len(raw) + 8))()
    return out[: ll.llama_tokenize(model.vocab, raw, len(raw), out, len(out), False, parse_special)]


def vocabulary(path: Path, kind: str, *, end: Sequence[Token] = (), **keys: str | bool | int) -> Path:
    start = [("<unk>", TokenType.UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    tokens = [*start, *([] if kind == "bert" else PIECES), *WORDS]
    if kind == "gpt2":
        tokens = [*start, *BYTES, ("cd", TokenType.NORMAL), ("Ġc", TokenType.NORMAL)]
        keys = {"pre": "gpt-2", "merges": "c d\nĠ c"} | keys
    elif kind == "bert":
        keys |= {"bos_token_id": 1, "eos_token_id": 2, "seperator_token_id": 2, "unknown_token_id": 0}
    elif kind == "t5":
        keys |= {"unknown_token_id": 0}
    taken = {text for text, _ in TANGLED}
    return write_vocabulary(path, kind, [*(token for token in tokens if token[0] not in taken), *TANGLED, *end], **keys)


KINDS: dict[str, tuple[str, dict[str, str | bool | int]]] = {
    "byte-level": ("gpt2", {}),
    "sentencepiece": ("llama", {}),
    "sentencepiece without a space in front": ("llama", {"add_space_prefix": False}),
    "unigram": ("t5", {}),
    "wordpiece": ("bert", {}),
}


@pytest.fixture(scope="module", params=[*KINDS, "phi-3", "SmolLM2", "Gemma 3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeModel]:
    path = tmp_path_factory.mktemp("vocabulary") / "m.gguf"
    if request.param == "SmolLM2":
        path = bundled_model()
    elif request.param == "Gemma 3":
        path = gemma()
    elif request.param == "phi-3":  # whose special tokens take in the blanks behind them
        vocabulary(path, "llama", end=[("<|endoftext|>", CONTROL)], name="Phi-3 mini")
    else:
        kind, keys = KINDS[request.param]
        vocabulary(path, kind, **keys)
    with closing(NativeModel(path, ModelOptions())) as opened:
        yield opened


def words(model: NativeModel) -> list[str]:
    """Texts of the model's special tokens, some of them at least, and pieces of them."""
    tokens = [model_text(model, i) for i in special_ids(model)]
    few = [*tokens[:100], *tokens[-100:]]
    return [*ALPHABET, *few, *(text[1:] for text in few), *(text[:-1] for text in few)]


def special_ids(model: NativeModel) -> list[int]:
    kinds = ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_USER_DEFINED | ll.LLAMA_TOKEN_ATTR_UNKNOWN
    return [i for i in range(model.vocab_size) if ll.llama_vocab_get_attr(model.vocab, i) & kinds]


def model_text(model: NativeModel, token_id: int) -> str:
    text: bytes = ll.llama_vocab_get_text(model.vocab, token_id)
    return text.decode()


def test_the_ids_are_those_that_llama_cpp_gives(model: NativeModel) -> None:
    tokenizer = GGUFTokenizer(model)

    @given(text=st.lists(st.sampled_from(words(model)), max_size=24).map("".join), parse_special=st.booleans())
    @settings(max_examples=150, derandomize=True)
    def same(text: str, parse_special: bool) -> None:
        wanted = own_ids(model, text, parse_special=parse_special)
        token_ids = tokenizer.encode(text, parse_special=parse_special, is_start=True)
        if not parse_special and any(mark in text for mark in tokenizer.special_texts()):
            # typed marks stay text, though plain text of some vocabularies becomes them
            assert not any(map(is_control, token_ids))
        else:
            assert token_ids == wanted

    def is_control(token_id: int) -> bool:
        return bool(ll.llama_vocab_get_attr(model.vocab, token_id) & ll.LLAMA_TOKEN_ATTR_CONTROL)

    same()


@pytest.mark.parametrize("between", ["", "x", " word", "<|im_"])
def test_llama_cpp_is_given_no_text_with_special_tokens_for_which_it_takes_the_square_of_their_number(
    monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    num, given = 100_000, list[bytes]()

    def tokenize(vocab: object, raw: bytes, *args: object) -> int:
        given.append(raw)
        return real(vocab, raw, *args)

    real = ll.llama_tokenize
    with closing(NativeModel(bundled_model(), ModelOptions())) as model:
        tokenizer = GGUFTokenizer(model)
        monkeypatch.setattr(ll, "llama_tokenize", tokenize)
        token_ids = tokenizer.encode(("<|im_end|>" + between) * num, parse_special=True, is_start=True)
        end = tokenizer.encode("<|im_end|>", parse_special=True, is_start=True)
        assert token_ids == [*end, *tokenizer.encode(between, parse_special=True, is_start=False)] * num
    assert not any(b"<|im_end|>" in raw for raw in given)
    assert len(given) <= 2  # the same words once each


def test_what_llama_cpp_looks_for_first_is_asked_once() -> None:
    asked = list[bytes]()

    def precedes(one: SpecialToken, other: SpecialToken, joined: bytes) -> bool:
        asked.append(joined)
        return one.text == b"bc"

    cut = SpecialTokens([SpecialToken(1, b"ab"), SpecialToken(2, b"bc")], precedes)
    assert list(cut.parts(b"abc" * 10_000)) == [b"a", 2] * 10_000
    assert asked == [b"abc"]


def test_texts_that_overlap_everywhere_are_cut_out_in_one_go() -> None:
    cut = SpecialTokens([SpecialToken(1, b"ab"), SpecialToken(2, b"bca")], lambda one, other, joined: None)
    assert list(cut.parts(b"abc" * 100_000)) == [b"a", *[2] * 99_999, b"bc"]
