"""Text to token ids and back by tokenizer.json and tokenizer.model, held to llama.cpp's and sentencepiece's own."""

import base64
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import sentencepiece
from gguf_models import gemma
from hf_models import gemma3_bf16, smollm2_bf16
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    CORPUS,
    LLAMA_LIKE,
    LLAMA_SHAPE,
    SMALL,
    SMALL_SHAPE,
    copied,
    joined,
    llama_like,
    small,
    trained,
    write,
)
from transformers import AutoTokenizer

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.gguf.tokenizer import GGUFTokenizer
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.locate import bundled_model

TEXTS = [
    "Hello, world!",
    " leading and trailing spaces  ",
    "안녕하세요, 만나서 반갑습니다. 오늘 날씨가 좋네요!",
    "Family 👨‍👩‍👧‍👦, flag 🇰🇷, skin tone 👍🏽.",
    "tabs\tand\n\nnewlines\r\n\n\n\nmany        spaces",
    "fn main() { let x = 0x1F; } // 12345 67,890.12",
    "Zażółć gęślą jaźń — «ünïcödé» ﬁ",
    "\x01 a control character, and a nul \x00 too",
    "日本語とEnglishが混ざった文",
    "<|im_start|>user\nhi<|im_end|>\n<bos>a<eos><start_of_turn>model\n<end_of_turn>",
    "▁ a symbol of sentencepiece, <0x0A> and <unk>",
]
TEXT = st.text(max_size=60) | st.text(alphabet="ab \n\t1▁<|>_éя한😀", max_size=60)


@dataclass
class Pair:
    """A tokenizer of ours and llama.cpp's of the same vocabulary."""

    ours: HFTokenizer
    theirs: GGUFTokenizer

    @cached_property
    def known(self) -> set[bytes]:
        """Single bytes that are tokens."""
        return {raw for raw in map(self.ours.token_bytes, range(self.ours.vocab_size)) if len(raw) == 1}


@pytest.fixture(scope="module", params=["SmolLM2", "Gemma 3"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    folder, file = (smollm2_bf16(), bundled_model()) if request.param == "SmolLM2" else (gemma3_bf16(), gemma())
    model = NativeModel(file, ModelOptions())
    yield Pair(HFTokenizer(folder, read_config(folder)), GGUFTokenizer(model))
    model.close()


@pytest.fixture(scope="module")
def smollm2() -> HFTokenizer:
    return HFTokenizer(smollm2_bf16(), read_config(smollm2_bf16()))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_start", [True, False])
@pytest.mark.parametrize("parse_special", [True, False])
def test_a_text_gets_the_ids_that_llama_cpp_gives_it(pair: Pair, text: str, is_start: bool, parse_special: bool):
    token_ids = pair.ours.encode(text, parse_special=parse_special, is_start=is_start)

    assert token_ids == pair.theirs.encode(text, parse_special=parse_special, is_start=is_start)


@given(text=TEXT, is_start=st.booleans())
@settings(max_examples=150)
def test_the_bytes_of_the_tokens_are_the_text(pair: Pair, text: str, is_start: bool):
    token_ids = pair.ours.encode(text, parse_special=False, is_start=is_start)

    # the vocabulary of SmolLM2 lacks bytes such as 0x04 and 0xf1, which are dropped; sentencepiece writes spaces as ▁
    # and so can't tell a ▁ in the text from a space
    known = bytes(byte for byte in text.encode() if bytes([byte]) in pair.known)
    assert joined(pair.ours, token_ids).replace("▁".encode(), b" ") == known.replace("▁".encode(), b" ")


def test_every_token_has_the_bytes_that_llama_cpp_gives_it(pair: Pair):
    ids = range(pair.ours.vocab_size)

    assert pair.ours.vocab_size == pair.theirs.vocab_size
    assert [i for i in ids if pair.ours.token_bytes(i) != pair.theirs.token_bytes(i)] == []


def test_special_tokens_ends_and_bos_are_those_of_the_gguf_file(pair: Pair):
    special = {i for i in range(pair.ours.vocab_size) if pair.ours.is_special(i)}
    guessed = {b"<reponame>", b"</s>"}  # llama.cpp takes these for ends by their names, wherever they are

    assert set(pair.ours.special_texts()) == {pair.ours.token_bytes(i).decode() for i in special}
    assert {pair.ours.token_bytes(i) for i in pair.theirs.eos_ids - pair.ours.eos_ids} <= guessed
    assert pair.ours.eos_ids <= pair.theirs.eos_ids
    assert (pair.ours.bos_id, pair.ours.adds_bos) == (pair.theirs.bos_id, pair.theirs.adds_bos)


def test_texts_get_the_ids_that_transformers_gives_them(smollm2: HFTokenizer):
    theirs = AutoTokenizer.from_pretrained(smollm2_bf16())

    for text in TEXTS:
        assert smollm2.encode(text, parse_special=True, is_start=True) == theirs.encode(text, add_special_tokens=False)


def test_no_text_is_no_token_and_an_unpaired_surrogate_is_replaced(smollm2: HFTokenizer):
    assert smollm2.encode("", parse_special=True, is_start=True) == []
    assert joined(smollm2, smollm2.encode("a\ud800b", parse_special=False, is_start=True)) == b"a?b"


def test_threads_may_share_a_tokenizer(pair: Pair):
    def encode(job: tuple[str, bool]) -> list[int]:
        return pair.ours.encode(job[0], parse_special=job[1], is_start=True)

    jobs = [(text, parse_special) for text in TEXTS for parse_special in (True, False)]
    expected = [encode(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, jobs * 20)) == expected * 20


@pytest.mark.parametrize("character", ["a", " ", "\n", "7", "한"])
def test_a_megabyte_of_one_character_is_tokenized(pair: Pair, character: str):
    text = character * ((1 << 20) // len(character.encode()))

    assert joined(pair.ours, pair.ours.encode(text, parse_special=False, is_start=True)) == text.encode()


# tokenizer.model, with sentencepiece itself as the twin


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_like(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> HFTokenizer:
    return HFTokenizer(llama_folder, LLAMA_SHAPE)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_gives_the_ids_that_sentencepiece_gives(tmp_path: Path, algorithm: str, prefix: bool):
    raw = trained(algorithm, add_dummy_prefix=prefix, **LLAMA_LIKE)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    ours, theirs = HFTokenizer(tmp_path, LLAMA_SHAPE), sentencepiece.SentencePieceProcessor(model_proto=raw)

    @given(st.sampled_from(CORPUS.splitlines()) | TEXT.filter(lambda text: "\0" not in text))
    @settings(max_examples=200)
    def hold(text: str) -> None:
        assert ours.encode(text, parse_special=False, is_start=True) == theirs.encode(text)

    hold()


def test_a_normalizing_unigram_model_gives_the_ids_that_sentencepiece_gives(tmp_path: Path):
    raw = trained("unigram", normalization_rule_name="nmt_nfkc", byte_fallback=True)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    ours, theirs = HFTokenizer(tmp_path, LLAMA_SHAPE), sentencepiece.SentencePieceProcessor(model_proto=raw)

    for text in [*TEXTS[:7], *CORPUS.splitlines()]:
        assert ours.encode(text, parse_special=False, is_start=True) == theirs.encode(text), text


@given(text=TEXT)
@settings(max_examples=100)
def test_the_leading_space_is_put_at_the_start_of_a_prompt_and_nowhere_else(llama: HFTokenizer, text: str):
    start = joined(llama, llama.encode(text, parse_special=False, is_start=True)).decode()
    later = joined(llama, llama.encode(text, parse_special=False, is_start=False)).decode()

    assert later == text.replace("▁", " ")
    assert start == (" " + later if text else "")


def test_bytes_that_no_piece_has_are_tokens_of_their_own(llama: HFTokenizer):
    token_ids = llama.encode("😀", parse_special=False, is_start=False)

    assert [llama.token_bytes(i) for i in token_ids] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]


def test_ids_of_the_model_that_the_tokenizer_lacks_add_no_text(tmp_path: Path):
    tokenizer = small(tmp_path)

    assert tokenizer.vocab_size == 8
    assert [tokenizer.token_bytes(i) for i in (3, 4, 5, 6, 7)] == [b"<think>", b"a", b" ", b"", b""]
    assert not tokenizer.is_special(7)


def test_paddings_and_cuts_of_the_training_run_are_left_aside(tmp_path: Path):
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}

    assert small(tmp_path, truncation=cut).encode("aaaa", parse_special=False, is_start=True) == [4, 4, 4, 4]


GIVES_UP = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
LONG_TABLE = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + 300 * b"x" + b"\0").decode()
BAD: list[tuple[dict[str, object], str]] = [
    ({"tokenizer.json": SMALL | {"model": None}}, r"tokenizer\.json: not a tokenizer of the tokenizers library"),
    ({"tokenizer.json": SMALL | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
                                 "pre_tokenizer": None}},
     r"tokenizer\.json: its decoder is WordPiece; byte-level and sentencepiece ones are served"),
    ({"tokenizer.json": SMALL | {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}},
     r"tokenizer\.json: its vocabulary is empty"),
    ({"tokenizer.json": SMALL | {"model": {"type": "BPE", "vocab": {}, "merges": []}}},
     r"tokenizer\.json: its vocabulary is empty"),
    ({"tokenizer.json": SMALL | {"normalizer": {"type": "Sequence", "normalizers": 4 * [
        {"type": "Replace", "pattern": {"String": "a"}, "content": 1000 * "a"}]}}},
     r"tokenizer\.json: its normalizer makes a text up to 1e\+12 times as long; 64 times are served"),
    ({"tokenizer.json": SMALL | {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": 64 * "a"}}},
     r"tokenizer\.json: its normalizer makes a text up to 65 times as long"),
    ({"tokenizer.json": SMALL | {"normalizer": {"type": "Prepend", "prepend": 2000 * "a"}}},
     r"tokenizer\.json: its normalizer puts 2000 bytes in front of a text; 1024 are served"),
    ({"tokenizer.json": SMALL | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_TABLE}}},
     r"tokenizer\.json: its normalizer's table of characters makes 300 bytes of one text; 256 are served"),
    ({"tokenizer.json": SMALL | {"pre_tokenizer": GIVES_UP | {"pattern": {"Regex": "([a-z ]+)+[0-9]"}}}},
     r"tokenizer\.json: the model's tokenizer gives up on this text: .*retry-limit"),
    ({"tokenizer.json": SMALL | {"model": {"type": "BPE", "vocab": {"a": 8}, "merges": []}}},
     r"tokenizer\.json: token 'a' has id 8, but vocab_size in config\.json is 8"),
    ({}, "holds neither tokenizer.json nor tokenizer.model"),
    ({"tokenizer_config.json": {"bos_token": 3}}, r"tokenizer_config\.json: bos_token is 3; it must be a token's text"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "line"), BAD, ids=lambda value: str(value)[:60])
def test_a_wrong_file_is_one_line_naming_file_and_field(tmp_path: Path, files: dict[str, object], line: str):
    for name, value in (files and {"tokenizer.json": SMALL} | files).items():
        write(tmp_path, name, value)

    with pytest.raises(BackendError, match=line) as caught:
        HFTokenizer(tmp_path, SMALL_SHAPE)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (
            ["vocab.json", "merges.txt", "vocab.txt"],
            r"merges.txt and vocab.json can't be read: let transformers write it",
        ),
        (["spiece.model"], "spiece.model can't be read: let transformers write it as tokenizer.json"),
        (["tekken.json", "params.json"], "tekken.json is of Mistral's own layout"),
        (["tokenizer.model.v3"], "a copy of it named tokenizer.model can be read"),
        (["qwen.tiktoken", "tokenization_qwen.py"], "qwen.tiktoken needs the model's own code"),
        (["vocab.json"], "copy the model's tokenizer too"),
    ],
)
def test_a_vocabulary_of_another_kind_is_named_with_what_to_do(tmp_path: Path, names: list[str], line: str):
    for name in names:
        (tmp_path / name).touch()

    with pytest.raises(BackendError, match=f"holds neither tokenizer.json nor tokenizer.model; .*{line}"):
        HFTokenizer(tmp_path, SMALL_SHAPE)


def test_links_to_files_that_are_gone_are_told(tmp_path: Path):
    write(tmp_path, "tokenizer.json", SMALL)
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / name).symlink_to("../blobs/0123")

    notes = HFTokenizer(tmp_path, SMALL_SHAPE).notes
    assert [note.partition(": a link to ")[0] for note in notes] == [
        f"left out: {tmp_path / name}"
        for name in ("added_tokens.json", "special_tokens_map.json", "generation_config.json")
    ]
    (tmp_path / "tokenizer_config.json").symlink_to("../blobs/0123")
    with pytest.raises(BackendError, match=r"tokenizer_config\.json: a link to .*, which is missing"):
        HFTokenizer(tmp_path, SMALL_SHAPE)


def test_a_vocabulary_of_tiktoken_is_no_sentencepiece_file_and_is_called_what_it_is(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")

    with pytest.raises(BackendError, match=r"tokenizer\.model: a vocabulary of tiktoken, .*; add the model's tokeniz"):
        HFTokenizer(tmp_path, SMALL_SHAPE)


BAD_LLAMAS: list[tuple[str, object, str]] = [
    ("added_tokens.json", {"<x>": "560"}, r"added_tokens\.json: the id of '<x>' is '560'; it must be a whole number"),
    ("tokenizer_config.json", {"added_tokens_decoder": 1}, "added_tokens_decoder is 1; it must map ids to tokens"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder of 'x' must be an object"),
]


@pytest.mark.parametrize(("name", "value", "line"), BAD_LLAMAS)
def test_wrong_additions_to_a_sentencepiece_model_are_one_line(
    llama_folder: Path, tmp_path: Path, name: str, value: object, line: str
):
    folder = copied(llama_folder, tmp_path)
    write(folder, name, value)

    with pytest.raises(BackendError, match=line):
        HFTokenizer(folder, LLAMA_SHAPE)


@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 3000))
@settings(max_examples=150)
def test_a_damaged_sentencepiece_model_is_read_or_refused_in_one_line(
    llama_folder: Path, tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
):
    raw = bytearray((llama_folder / "tokenizer.model").read_bytes())
    raw[at] = byte
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    path.write_bytes(raw[: len(raw) - cut])

    line = line_of(path.parent)

    assert line is None or (line.startswith(f"{path}: ") and "\n" not in line)


def test_a_text_on_which_a_pattern_gives_up_is_an_error_and_no_end(tmp_path: Path):
    tokenizer = small(tmp_path, pre_tokenizer=GIVES_UP)
    assert tokenizer.encode("aa", parse_special=False, is_start=True) == [4, 4]

    with pytest.raises(BackendError, match=r"the model's tokenizer gives up on this text: .*retry-limit"):
        tokenizer.encode("a" * 40 + "!", parse_special=False, is_start=True)


NAMED = {"<s>": 0, "</s>": 1, "<|eot_id|>": 2, "<think>": 3}
LETTERS = list(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]))  # GPT-2's alphabet
FULL = NAMED | {text: i for i, text in enumerate(LETTERS, 4)}
LESS = NAMED | {text: i for i, text in enumerate(["aa" if text == "a" else text for text in LETTERS], 4)}
BYTES = NAMED | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
SPACED: dict[str, object] = {
    "model": {"type": "BPE", "vocab": BYTES | {"▁▁▁▁": 260}, "merges": [], "byte_fallback": True},
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
}


@pytest.mark.parametrize(
    ("parts", "lost", "longest"),
    [
        ({"model": {"type": "BPE", "vocab": FULL, "merges": []}}, 0, 10),
        ({"model": {"type": "BPE", "vocab": LESS, "merges": []}}, 1, 10),
        ({"model": {"type": "BPE", "vocab": FULL, "merges": []}, "normalizer": {"type": "NFC"}}, 0, 30),
        ({"model": {"type": "BPE", "vocab": FULL, "merges": []}, "normalizer": {"type": "NFKC"}}, 0, None),
        ({"model": {"type": "BPE", "vocab": FULL, "merges": []}, "normalizer": {
            "type": "Strip", "strip_left": True, "strip_right": True}}, 0, None),
        ({"model": {"type": "BPE", "vocab": FULL, "merges": []}, "pre_tokenizer": {"type": "Sequence",
            "pretokenizers": [GIVES_UP | {"behavior": "Removed"}, SMALL["pre_tokenizer"]]}}, 0, None),
        (SPACED, 0, 12),
        (SPACED | {"model": {"type": "BPE", "vocab": NAMED | {"▁": 4}, "merges": [], "byte_fallback": True}}, 0, None),
    ],
)  # fmt: skip
def test_a_token_stands_for_so_many_bytes_at_most(
    tmp_path: Path, parts: dict[str, object], lost: int, longest: int | None
):
    tokenizer = small(tmp_path, shape=replace(SMALL_SHAPE, vocab_size=400), **parts)
    assert (len(tokenizer.lost_bytes), tokenizer.max_token_bytes) == (lost, longest)


def line_of(folder: Path) -> str | None:
    try:
        HFTokenizer(folder, LLAMA_SHAPE)
    except BackendError as error:
        return str(error)
    return None
