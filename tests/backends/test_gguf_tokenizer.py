"""Text to token ids and back, on a byte-level vocabulary and on a sentencepiece one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkout import DATA
from gguf import GGUFWriter, TokenType
from gguf_files import write_model
from gguf_models import gemma
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.gguf.tokenizer import GGUFTokenizer
from tightrope.backends.locate import bundled_model

TEXTS = [
    "Hello, world!",
    " leading and trailing spaces  ",
    "안녕하세요, 만나서 반갑습니다. 오늘 날씨가 좋네요!",
    "Family 👨‍👩‍👧‍👦, flag 🇰🇷, skin tone 👍🏽.",
    "tabs\tand\n\nnewlines\r\n",
    "fn main() { let x = 0x1F; }",
    "Zażółć gęślą jaźń — «ünïcödé»",
    "\x01 a control character, and a nul \x00 too",
    "日本語とEnglishが混ざった文",
]


@pytest.fixture(scope="module", params=["SmolLM2", "Gemma 3"])
def tokenizer(request: pytest.FixtureRequest) -> Iterator[GGUFTokenizer]:
    model = NativeModel(bundled_model() if request.param == "SmolLM2" else gemma(), ModelOptions())
    yield GGUFTokenizer(model)
    model.close()


@pytest.fixture(scope="module")
def smollm() -> Iterator[GGUFTokenizer]:
    model = NativeModel(bundled_model(), ModelOptions())
    yield GGUFTokenizer(model)
    model.close()


def joined(tokenizer: GGUFTokenizer, token_ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_start", [True, False])
def test_the_bytes_of_the_tokens_are_the_text(tokenizer: GGUFTokenizer, text: str, is_start: bool) -> None:
    token_ids = tokenizer.encode(text, parse_special=False, is_start=is_start)
    assert joined(tokenizer, token_ids) == text.encode()


def test_no_text_is_no_token(tokenizer: GGUFTokenizer) -> None:
    assert tokenizer.encode("", parse_special=True, is_start=True) == []


def test_special_tokens_are_parsed_only_when_asked_for(smollm: GGUFTokenizer) -> None:
    parsed = smollm.encode("<|im_start|>user", parse_special=True, is_start=True)
    plain = smollm.encode("<|im_start|>user", parse_special=False, is_start=True)
    assert smollm.is_special(parsed[0])
    assert not any(smollm.is_special(token_id) for token_id in plain)
    assert joined(smollm, parsed) == joined(smollm, plain) == b"<|im_start|>user"


def test_every_special_text_is_one_special_token(tokenizer: GGUFTokenizer) -> None:
    for text in tokenizer.special_texts():
        token_ids = tokenizer.encode(text, parse_special=True, is_start=False)
        assert len(token_ids) == 1, text
        assert tokenizer.is_special(token_ids[0])


def test_what_ends_a_turn_and_what_opens_a_prompt_come_from_the_file(tokenizer: GGUFTokenizer) -> None:
    endings = {tokenizer.token_bytes(token_id) for token_id in tokenizer.eos_ids}
    if tokenizer.adds_bos:
        assert tokenizer.bos_id is not None
        assert tokenizer.token_bytes(tokenizer.bos_id) == b"<bos>"
        assert endings >= {b"<eos>", b"<end_of_turn>"}
    else:
        assert endings >= {b"<|im_end|>", b"<|endoftext|>"}


def test_an_unpaired_surrogate_is_replaced(smollm: GGUFTokenizer) -> None:
    assert joined(smollm, smollm.encode("a\ud800b", parse_special=False, is_start=True)) == b"a?b"


def test_a_text_that_comes_again_is_not_read_again(smollm: GGUFTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Once upon a time there was a fox by a river. " * 4
    first = smollm.encode(f"<|im_start|>{message}<|im_end|>", parse_special=True, is_start=True)
    monkeypatch.setattr(ll, "llama_tokenize", None)
    again = smollm.encode(f"<|im_end|>{message}<|im_start|>", parse_special=True, is_start=True)
    assert first[1:-1] == again[1:-1]


def test_a_text_is_read_again_where_it_would_be_read_otherwise(smollm: GGUFTokenizer) -> None:
    text = "<|im_start|> is the mark of a turn that begins, and this is a long line of text about it."
    plain, marked = (smollm.encode(text, parse_special=parse, is_start=True) for parse in (False, True))
    assert plain != marked
    assert smollm.encode(text, parse_special=False, is_start=True) == plain
    assert smollm.encode(text, parse_special=True, is_start=True) == marked


def test_threads_may_share_a_tokenizer(tokenizer: GGUFTokenizer) -> None:
    expected = [tokenizer.encode(text, parse_special=True, is_start=True) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        encode = pool.map(lambda text: tokenizer.encode(text, parse_special=True, is_start=True), TEXTS * 20)
        assert list(encode) == expected * 20


@pytest.mark.parametrize("character", ["a", " ", "\n", "7", "!", "한", "😀"])
def test_a_megabyte_of_one_character_is_tokenized(tokenizer: GGUFTokenizer, character: str) -> None:
    text = character * ((1 << 20) // len(character.encode()))
    assert joined(tokenizer, tokenizer.encode(text, parse_special=False, is_start=True)) == text.encode()


@given(text=st.text(), repeat=st.integers(1, 40), parse_special=st.booleans())
@example(text=" ", repeat=400, parse_special=False)
@example(text="▁", repeat=400, parse_special=False)
@example(text="\x04", repeat=400, parse_special=False)
@example(text="<|endoftext|>", repeat=9, parse_special=True)
@settings(derandomize=True)
def test_a_text_has_so_many_tokens_at_least(
    tokenizer: GGUFTokenizer, text: str, repeat: int, parse_special: bool
) -> None:
    assert tokenizer.max_token_bytes is not None
    raw = (text * repeat).encode().translate(None, tokenizer.lost_bytes)
    token_ids = tokenizer.encode(text * repeat, parse_special=parse_special, is_start=False)
    assert len(token_ids) * tokenizer.max_token_bytes >= len(raw)


def test_a_user_defined_token_becomes_a_mark_when_the_chat_template_says_so() -> None:
    model = NativeModel(gemma(), ModelOptions())
    tokenizer = GGUFTokenizer(model)
    assert "<table>" in tokenizer.added_texts()
    [table] = tokenizer.encode("<table>", parse_special=False, is_start=False)

    tokenizer.set_marks(["<table>", "<unknown>"], ["<table>"])

    text = "a <table> <table"
    plain = tokenizer.encode(text, parse_special=False, is_start=True)
    assert tokenizer.encode("<table>", parse_special=True, is_start=False) == [table]
    assert tokenizer.is_special(table)
    assert "<table>" in tokenizer.special_texts()
    assert "<table>" not in tokenizer.added_texts()
    assert table in tokenizer.eos_ids
    assert table not in plain
    assert joined(tokenizer, plain) == text.encode()
    model.close()


def test_a_blank_without_a_piece_of_its_own_takes_three_tokens(tmp_path: Path) -> None:
    def without_blank(writer: GGUFWriter) -> None:
        keys = writer.kv_data[0]
        size = len(keys["tokenizer.ggml.tokens"].value)
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        keys["tokenizer.ggml.tokens"].value[:] = pieces + [f"word{i}" for i in range(size - len(pieces))]
        keys["tokenizer.ggml.token_type"].value[3:259] = [TokenType.BYTE] * 256
        keys["tokenizer.ggml.model"].value = "llama"

    path = write_model(DATA / "adapters" / "llama-bf16", tmp_path / "m.gguf", keys=without_blank)
    model = NativeModel(path, ModelOptions())
    tokenizer = GGUFTokenizer(model)
    blank = [3 + byte for byte in "▁".encode()]
    assert tokenizer.encode(12 * " ", parse_special=False, is_start=False) == 12 * blank
    model.close()
