"""What ends a turn by a GGUF file, and marks that a person types, on vocabularies of both kinds."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from gguf import TokenType
from gguf_files import Token, write_vocabulary

from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.gguf.tokenizer import GGUFTokenizer
from tightrope.backends.plain_text import MarkCutter, any_of, place_to_cut

pytestmark = pytest.mark.quick

NORMAL, CONTROL, USER = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED
LETTERS = [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x100))]
BYTES = [(text, NORMAL) for text in (*LETTERS, *map(chr, range(256, 256 + 256 - len(LETTERS))))]  # GPT-2's alphabet
PIECES = [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
WORDS = [
    (text, NORMAL) for text in ("▁", *"<|>[]/imstaredun_ \n", "<|", "|>", "im", "▁<", "st", "_st", "art", "_start")
]
TURN_MARKS = ("<|im_start|>", "<|im_stop|>", "[START]", "<|>", "|>|")
TYPED = [
    *TURN_MARKS,
    "<|im_start|>user\nhi<|im_stop|>\n",
    " <|im_start|> ",
    "<|im_start|<|im_start|>|>",
    "<|>|>|><|im_start|><|im_start|>",
    "an <|im_start | that is none",
    "",
]


def bpe(path: Path, added: list[Token], **keys: str | bool | int) -> Path:
    merges = "< |\n| >\ni m\ns t\n_ st\na r\nar t\n_st art"
    joined = [(pair.replace(" ", ""), NORMAL) for pair in merges.splitlines()]
    return write_vocabulary(path, "gpt2", [*BYTES, *joined, *added], **({"pre": "gpt-2", "merges": merges} | keys))


def spm(path: Path, added: list[Token], **keys: str | bool | int) -> Path:
    """Ids 0 to 2 are what the first three of `added` say."""
    return write_vocabulary(path, "llama", [*added[:3], *PIECES, *WORDS, *added[3:]], **keys)


Opened = Callable[[Path], GGUFTokenizer]
SPM_START = [("<unk>", TokenType.UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]


@pytest.fixture
def opened() -> Iterator[Opened]:
    with ExitStack() as stack:
        yield lambda path: GGUFTokenizer(stack.enter_context(closing(NativeModel(path, ModelOptions()))))


def texts(tokenizer: GGUFTokenizer) -> set[str]:
    return {tokenizer.token_bytes(i).decode() for i in tokenizer.eos_ids}


@pytest.mark.parametrize(
    ("added", "keys", "ends"),
    [
        ([], {}, set()),
        ([("<|im_end|>", NORMAL)], {}, {"<|im_end|>"}),
        ([("<|im_end|>", USER), ("<|turn|>", USER)], {"eos_token_id": 265}, {"<|im_end|>", "<|turn|>"}),
        (
            [("<|turn|>", CONTROL), ("<|eot|>", CONTROL)],
            {"eos_token_id": 264, "eot_token_id": 265},
            {"<|turn|>", "<|eot|>"},
        ),
        ([("<|turn|>", CONTROL)], {"eos_token_id": 99999}, set()),
        ([("<|turn|>", CONTROL)], {"eos_token_id": 11}, {","}),
    ],
)
def test_a_byte_level_file_ends_on_what_it_names_and_on_its_marks_alone(
    opened: Opened, tmp_path: Path, added: list[Token], keys: dict[str, int], ends: set[str]
) -> None:
    assert texts(opened(bpe(tmp_path / "m.gguf", added, **keys))) == ends


@pytest.mark.parametrize(
    ("start", "keys", "ends"),
    [
        (SPM_START, {}, {"</s>"}),
        ([*SPM_START[:2], ("b", NORMAL)], {}, set()),
        ([*SPM_START[:2], ("<pad>", CONTROL)], {}, set()),
        ([*SPM_START[:2], ("b", NORMAL)], {"eos_token_id": 1}, {"<s>"}),
    ],
)
def test_a_sentencepiece_file_ends_on_what_it_names_and_on_its_marks_alone(
    opened: Opened, tmp_path: Path, start: list[Token], keys: dict[str, int], ends: set[str]
) -> None:
    assert texts(opened(spm(tmp_path / "m.gguf", start, **keys))) == ends


def test_the_tokens_that_a_file_names_have_the_names_of_chat_templates(opened: Opened, tmp_path: Path) -> None:
    added = [("<unk>", CONTROL), ("<pad>", CONTROL), ("<s>", CONTROL), ("</s>", CONTROL)]
    keys = {"unknown_token_id": 264, "padding_token_id": 265, "bos_token_id": 266, "eos_token_id": 267}
    tokenizer = opened(bpe(tmp_path / "m.gguf", added, **keys, mask_token_id=4_000_000_000))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    assert dict(tokenizer.named_tokens) == names


def test_a_prompt_begins_with_the_token_that_the_file_names_and_with_no_letter(opened: Opened, tmp_path: Path) -> None:
    for name, keys in {"asked": {"add_bos_token": True}, "by kind": {"pre": "llama-bpe"}}.items():
        tokenizer = opened(bpe(tmp_path / f"{name}.gguf", [("<|start|>", CONTROL)], **keys))
        assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)
    tokenizer = opened(bpe(tmp_path / "m.gguf", [("<s>", CONTROL)], add_bos_token=True, bos_token_id=264))
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.named_tokens) == (264, True, (("bos_token", "<s>"),))
    tokenizer = opened(spm(tmp_path / "spm.gguf", SPM_START))
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.named_tokens) == (1, True, ())


@pytest.mark.parametrize("write", [bpe, spm])
def test_a_typed_mark_is_tokenized_as_if_the_vocabulary_did_not_have_it(
    opened: Opened, tmp_path: Path, write: Callable[..., Path]
) -> None:
    start = SPM_START if write is spm else []
    plain = opened(write(tmp_path / "plain.gguf", [*start, *((mark, CONTROL) for mark in TURN_MARKS)]))
    marked = opened(write(tmp_path / "marked.gguf", [*start, *((mark, USER) for mark in TURN_MARKS)]))
    assert marked.added_texts() == list(TURN_MARKS)
    assert all(len(marked.encode(mark, parse_special=False, is_start=False)) == 1 for mark in TURN_MARKS)

    marked.set_marks(TURN_MARKS, TURN_MARKS[1:2])

    assert set(TURN_MARKS) <= set(marked.special_texts())
    assert texts(marked) - texts(plain) == {"<|im_stop|>"}
    for text in TYPED:
        for is_start in (True, False):
            typed = marked.encode(text, parse_special=False, is_start=is_start)
            assert not any(map(marked.is_special, typed)), text
            wanted = plain.encode(text, parse_special=False, is_start=is_start)
            assert b"".join(map(marked.token_bytes, typed)) == b"".join(map(plain.token_bytes, wanted))
            if text in TURN_MARKS[:3]:
                assert typed == wanted, text
            for tokenizer in (plain, marked):
                parsed = tokenizer.encode(text, parse_special=True, is_start=is_start)
                assert any(map(tokenizer.is_special, parsed)) == any(mark in text for mark in TURN_MARKS)


@pytest.mark.parametrize("write", [bpe, spm])
def test_a_mark_that_an_older_converter_wrote_as_plain_text_is_one_token_all_the_same(
    opened: Opened, tmp_path: Path, write: Callable[..., Path]
) -> None:
    start, marks = SPM_START if write is spm else [], TURN_MARKS[:3]
    user = opened(write(tmp_path / "user.gguf", [*start, *((mark, USER) for mark in marks)]))
    plain = opened(write(tmp_path / "plain.gguf", [*start, *((mark, NORMAL) for mark in marks)]))
    assert plain.added_texts() == list(marks)
    assert not any(len(plain.encode(mark, parse_special=True, is_start=False)) == 1 for mark in marks)

    for tokenizer in (user, plain):
        tokenizer.set_marks(marks, marks[1:2])

    assert plain.eos_ids == user.eos_ids
    for text in TYPED:
        for is_start in (True, False):
            typed = plain.encode(text, parse_special=False, is_start=is_start)
            assert not any(map(plain.is_special, typed))
            if "<|>" not in text:
                parsed = plain.encode(text, parse_special=True, is_start=is_start)
                assert parsed == user.encode(text, parse_special=True, is_start=is_start), text


@pytest.mark.parametrize("kind", [USER, NORMAL, CONTROL])
@pytest.mark.parametrize("key", ["eos_token_id", "eot_token_id", "eom_token_id"])
def test_an_end_that_the_file_names_is_no_text_whatever_its_type(
    opened: Opened, tmp_path: Path, key: str, kind: TokenType
) -> None:
    for name, make, first in (("bpe", bpe, 264), ("spm", spm, 3 + len(PIECES) + len(WORDS))):
        added = [*(SPM_START if make is spm else []), ("<|halt|>", kind), ("Human:", USER)]
        tokenizer = opened(make(tmp_path / f"{name}.gguf", added, **{key: first}))
        assert first in tokenizer.eos_ids
        assert "<|halt|>" in tokenizer.special_texts()
        assert first in tokenizer.encode("a<|halt|>b", parse_special=True, is_start=True)
        assert first not in tokenizer.encode("a<|halt|>b", parse_special=False, is_start=True)
        tokenizer.set_marks((), ())
        assert first in tokenizer.encode("a<|halt|>b", parse_special=True, is_start=True)
        assert tokenizer.added_texts() == ["Human:"]


def test_plain_tokens_that_text_becomes_are_no_marks(opened: Opened, tmp_path: Path) -> None:
    html = [("</", NORMAL), ("</>", NORMAL)]
    tokenizer = opened(write_vocabulary(tmp_path / "m.gguf", "gpt2", [*BYTES, *html], pre="gpt-2", merges="< /\n</ >"))
    assert tokenizer.added_texts() == []
    assert len(tokenizer.encode("</>", parse_special=True, is_start=False)) == 1


def test_no_piece_of_a_text_holds_a_mark() -> None:
    cutter = MarkCutter({"<<": 1, "<a>": 2, "a><": 1, "<<<a": 3})
    for text in ("", "plain", "<<", "<<<a>", "<a><a><<<<a>", "<" * 1001, "<a" * 50 + ">"):
        pieces = cutter.pieces(text)
        assert "".join(pieces) == text
        assert not any(mark in piece for piece in pieces for mark in ("<<", "<a>", "a><", "<<<a"))


def test_the_longest_of_many_texts_is_found_and_fast() -> None:
    texts = ["<", "<a", "<ab", "<abc>", "</s>", "a", "b*", "▁x", *(f"<|reserved_{i}|>" for i in range(1000)), "<" * 30]
    pattern = re.compile(any_of(texts))
    plain = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    for text in ("<ab<abc><|reserved_12|> b*b▁x<|reserved_1234|></s>", "<" * 31 + "<a<|reserved_1|>", "", "xyz"):
        assert pattern.findall(text) == plain.findall(text)
    assert pattern.findall("<|reserved_" * 100_000) == ["<"] * 100_000  # looked for one by one: for seconds
    assert re.search(any_of([]), "text") is None


def test_a_mark_that_plain_text_does_not_hold_is_not_cut() -> None:
    assert place_to_cut("ab", 9, lambda text: [1] * len(text)) is None
    assert place_to_cut("abc", 9, lambda text: [9] if text == "abc" else [1] if text == "ab" else [1] * len(text)) == 2
    assert place_to_cut("a", 9, lambda text: [9]) is None
