"""Hard text over folders whose tokenizers are spread over their files in every way, held to what made the files."""

import re
from pathlib import Path

import pytest
import sentencepiece
from odd_folders import (
    BASE,
    FAST,
    HARD,
    LLAMA,
    NAMES,
    byte_level,
    bytes_of,
    config,
    flagged,
    pieces,
    shape,
    trained,
    write,
)
from transformers import AutoTokenizer

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.hf.text.tokenizer import HFTokenizer

pytestmark = pytest.mark.quick

CHAT = "<|im_start|>user\nthe ferry <|im_end|>\n<|im_start|> </s>x<s> y <tool> z <|x|> a<|x|>b ferry ferryman"
SIZE = len(pieces(trained()))
IM = {259: flagged("<|im_start|>"), 260: flagged("<|im_end|>")}


def decoder(*parts: dict[int, dict[str, object]]) -> dict[str, object]:
    return {"added_tokens_decoder": {str(i): token for part in parts for i, token in part.items()}}


# tokenizer.json in each of the ways in which its tokens are stated; transformers is the twin
FOLDERS: dict[str, dict[str, object]] = {
    "tokenizer.json alone": {
        "tokenizer.json": byte_level(BASE | IM | {261: flagged("<|x|>", False, lstrip=True, rstrip=True)}),
    },
    "words that are tokens where they stand alone": {
        "tokenizer.json": byte_level(BASE | {259: flagged("ferry", False, single_word=True)}),
        "tokenizer_config.json": FAST,
    },
    "added_tokens_decoder": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST | decoder(BASE, IM),
    },
    "added_tokens_decoder gives other flags": {
        "tokenizer.json": byte_level(BASE | {259: flagged("<|x|>", False)}),
        "tokenizer_config.json": FAST | decoder(BASE, {259: flagged("<|x|>", True, lstrip=True)}),
    },
    "added_tokens_decoder takes the special flag away": {
        "tokenizer.json": byte_level(BASE | {259: flagged("<|x|>", True)}),
        "tokenizer_config.json": FAST | decoder(BASE, {259: flagged("<|x|>", False, rstrip=True)}),
    },
    "added_tokens.json": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST,
        "added_tokens.json": {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 259, "<|im_end|>": 260},
    },
    "added_tokens.json and special_tokens_map.json": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST,
        "added_tokens.json": {"<|im_start|>": 259, "<|im_end|>": 260},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
    },
    "special_tokens_map.json names tokens without ids": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST,
        "special_tokens_map.json": {
            "eos_token": flagged("<|im_end|>", rstrip=True),
            "pad_token": flagged("<|x|>", lstrip=True),
        },
    },
    "special_tokens_map.json beside added_tokens_decoder": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST | decoder(BASE, IM),
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    },
    "additional_special_tokens": {
        "tokenizer.json": byte_level(BASE | {259: flagged("<|im_start|>", False)}),
        "tokenizer_config.json": FAST | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    },
    "lists in two files": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST | {"extra_special_tokens": ["<|x|>"]},
        "added_tokens.json": {"<|im_start|>": 259, "<|im_end|>": 260},
        "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    },
    "tokens without ids in two files": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST | {"extra_special_tokens": ["<|x|>"]},
        "special_tokens_map.json": {"pad_token": "<|im_end|>", "eos_token": "<|im_start|>"},
    },
    "extra_special_tokens by name": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST | {"extra_special_tokens": {"image_token": "<|x|>"}},
    },
    "both tokenizer.json and tokenizer.model": {
        "tokenizer.json": byte_level(),
        "tokenizer.model": trained(),
        "tokenizer_config.json": FAST | decoder(BASE, IM),
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_tokenizer_json_gives_the_ids_that_transformers_gives(tmp_path: Path, name: str):
    write(tmp_path, FOLDERS[name] | {"config.json": config()})
    ours, theirs = HFTokenizer(tmp_path, shape(300)), AutoTokenizer.from_pretrained(tmp_path)

    for text in [CHAT, *HARD]:
        token_ids = ours.encode(text, parse_special=True, is_start=True)
        assert token_ids == theirs.encode(text, add_special_tokens=False), text


def keeps(ours: HFTokenizer, text: str) -> bool:
    """Whether plain text comes back as it was, without a special token in it."""
    token_ids = ours.encode(text, parse_special=False, is_start=False)
    assert not any(map(ours.is_special, token_ids))
    return bytes_of(ours, token_ids).replace("▁".encode(), b" ") == text.encode().replace("▁".encode(), b" ")


@pytest.mark.parametrize("name", [name for name in FOLDERS if "x|>" not in str(FOLDERS[name])])
def test_typed_text_comes_back_whole_and_its_marks_are_letters(tmp_path: Path, name: str):
    ours = HFTokenizer(write(tmp_path, FOLDERS[name]), shape(300))

    assert all(keeps(ours, text) for text in [CHAT, *HARD])


# tokenizer.model in each of these ways; sentencepiece is the twin
MARKED = trained(user_defined_symbols="<|im_start|>,<|im_end|>,<tool>")
SPACES = trained(user_defined_symbols="▁▁,▁▁▁▁,▁▁▁▁▁▁▁▁")
MODELS: dict[str, tuple[bytes, dict[str, object]]] = {
    "tokenizer.model alone": (trained(), {}),
    "a llama's": (trained(), {"tokenizer_config.json": LLAMA}),
    "a llama's from before 2023": (trained(), {"tokenizer_config.json": LLAMA | {"legacy": True}}),
    "added_tokens.json lists old tokens": (
        trained(),
        {
            "tokenizer_config.json": LLAMA | {"eos_token": "<|im_end|>"},
            "added_tokens.json": {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": SIZE, "<|im_start|>": SIZE + 1},
        },
    ),
    "added_tokens_decoder": (
        trained(),
        {
            "tokenizer_config.json": NAMES
            | decoder(BASE, {SIZE: flagged("<|im_start|>"), SIZE + 1: flagged("<|im_end|>")})
        },
    ),
    "special_tokens_map.json": (trained(), {"special_tokens_map.json": {"eos_token": "<|im_end|>"}}),
    "user-defined pieces": (MARKED, {"tokenizer_config.json": NAMES}),
    "user-defined pieces in a unigram model": (
        trained("unigram", 300, user_defined_symbols="<|im_start|>,<|im_end|>,<tool>"),
        {},
    ),
    "user-defined runs of spaces": (SPACES, {}),
    "user-defined runs of spaces, listed again": (
        SPACES,
        {"tokenizer_config.json": decoder(BASE, {i: flagged("▁" * n, False) for i, n in ((3, 2), (4, 4), (5, 8))})},
    ),
    "no space in front": (trained(add_dummy_prefix=False), {}),
    "runs of spaces made one": (trained(remove_extra_whitespaces=True), {}),
    "a unigram model": (trained("unigram", 300), {}),
    "characters made one by a table": (trained("unigram", 300, normalization_rule_name="nmt_nfkc"), {}),
    "letters made small by a table": (
        trained("bpe", 400, normalization_rule_name="nmt_nfkc_cf", remove_extra_whitespaces=True),
        {},
    ),
    "a unigram model without byte pieces": (trained("unigram", 300, byte_fallback=False), {}),
    "renamed user-defined pieces": (
        trained(user_defined_symbols="<free0>,<free1>"),
        {"tokenizer_config.json": decoder(BASE, {3: flagged("<|im_start|>"), 4: flagged("<|im_end|>")})},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_with_tokenizer_model_gives_the_ids_that_sentencepiece_gives(tmp_path: Path, name: str):
    raw, files = MODELS[name]
    ours = HFTokenizer(write(tmp_path, files | {"tokenizer.model": raw}), shape(2048))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)

    for text in HARD:
        assert ours.encode(text, parse_special=False, is_start=True) == theirs.encode(text), text


@pytest.mark.parametrize("name", [name for name in MODELS if not re.search("made|without byte", name)])
def test_typed_text_comes_back_whole_over_sentencepiece_too(tmp_path: Path, name: str):
    raw, files = MODELS[name]
    ours = HFTokenizer(write(tmp_path, files | {"tokenizer.model": raw}), shape(2048))

    assert all(keeps(ours, text) for text in [CHAT, *HARD])


@pytest.mark.parametrize(
    "raw", [MARKED, trained("unigram", 300, user_defined_symbols="<|im_start|>,<|im_end|>,<tool>")]
)
def test_user_defined_marks_stand_in_a_prompt_where_sentencepiece_finds_them(tmp_path: Path, raw: bytes):
    ours = HFTokenizer(write(tmp_path, {"tokenizer.model": raw}), shape(2048))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)

    for text in ["<|im_start|>user\nthe ferry <|im_end|>\n<|im_start|>", "the<tool> ferry<|im_end|>", "<tool>"]:
        assert ours.encode(text, parse_special=True, is_start=True) == theirs.encode(text), text
    assert [theirs.id_to_piece(i) for i in sorted(ours.eos_ids)] == ["</s>", "<|im_end|>"]
    assert set(ours.special_texts()) == {"<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"}
    assert ours.added_texts() == ["<tool>"]


def parts(tokenizer: HFTokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in tokenizer.encode(text, parse_special=True, is_start=True)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LLAMA, [b"<s>", b"the", b" ferry", b"</s>", b"the"]),
        (LLAMA | {"legacy": True}, [b"<s>", b" the", b" ferry", b"</s>", b" the"]),
        (NAMES, [b"<s>", b" the", b" ferry", b"</s>", b" the"]),
        (NAMES | {"legacy": False}, [b"<s>", b"the", b" ferry", b"</s>", b"the"]),
        (NAMES | {"add_prefix_space": False}, [b"<s>", b"the", b" ferry", b"</s>", b"the"]),
    ],
)  # as transformers reads these settings
def test_settings_say_where_a_space_is_put(tmp_path: Path, settings: dict[str, object], expected: list[bytes]):
    ours = HFTokenizer(write(tmp_path, {"tokenizer.model": trained(), "tokenizer_config.json": settings}), shape(2048))

    assert parts(ours, "<s>the ferry</s>the") == expected


def test_blanks_beside_a_token_that_takes_them_in_are_part_of_it(tmp_path: Path):
    taking = {SIZE: flagged("<|l|>", lstrip=True), SIZE + 1: flagged("<|r|>", rstrip=True)}
    files = {"tokenizer.model": trained(), "tokenizer_config.json": LLAMA | {"legacy": True} | decoder(BASE, taking)}
    ours = HFTokenizer(write(tmp_path, files), shape(2048))

    assert parts(ours, "the \n<|l|>the<|r|>  the") == [b" the", b"<|l|>", b" the", b"<|r|>", b" the"]


# what is stated beyond the vocabulary


def test_a_token_keeps_the_id_that_its_file_states(tmp_path: Path):
    apart = BASE | {270: flagged("<|im_end|>"), 265: flagged("<|im_start|>")}  # transformers would number them anew
    ours = HFTokenizer(write(tmp_path, {"tokenizer.json": byte_level(apart)}), shape(300))

    assert ours.encode("<|im_start|><|im_end|>", parse_special=True, is_start=True) == [265, 270]
    assert [ours.token_bytes(i) for i in (265, 270, 259)] == [b"<|im_start|>", b"<|im_end|>", b""]
    assert ours.eos_ids == {270}

    listed = write(tmp_path / "listed", {"tokenizer.model": trained(), "added_tokens.json": {"<|im_end|>": SIZE + 9}})
    assert HFTokenizer(listed, shape(2048)).encode("<|im_end|>", parse_special=True, is_start=True) == [SIZE + 9]


def test_a_vocabulary_with_gaps_leaves_no_ids_for_added_tokens(tmp_path: Path):
    table = byte_level(BASE | {280: flagged("<|im_end|>")})
    table["model"]["vocab"]["!"] = 259  # the library numbers added tokens from here on, as it counts 259 pieces

    with pytest.raises(BackendError, match=r"tokenizer\.json: its vocabulary has fewer pieces than ids"):
        HFTokenizer(write(tmp_path, {"tokenizer.json": table}), shape(300))


def test_tokens_that_the_model_has_no_rows_for_are_text_with_one_note(tmp_path: Path):
    beyond = BASE | {259: flagged("<|im_end|>"), 300: flagged("<pad>"), 301: flagged("<|x|>", False)}
    files = {"tokenizer.json": byte_level(beyond), "tokenizer_config.json": FAST | {"pad_token": "<pad>"}}
    ours = HFTokenizer(write(tmp_path, files), shape(300))

    assert bytes_of(ours, ours.encode("<pad><|x|>", parse_special=True, is_start=True)) == b"<pad><|x|>"
    assert max(ours.encode("<pad><|x|>", parse_special=True, is_start=True)) < 259
    assert "<pad>" not in ours.special_texts()
    assert dict(ours.named_tokens)["pad_token"] == "<pad>"
    [note] = ours.notes
    assert note.endswith("left out, as the model has ids 0 to 299: '<pad>' (id 300), '<|x|>' (id 301)")


def test_pieces_that_the_model_has_no_rows_for_are_never_made_of_letters(tmp_path: Path):
    table = byte_level(more=("ab", "abc", "<pad>"))
    table["model"]["merges"] = ["a b", "ab c"]
    ours = HFTokenizer(write(tmp_path, {"tokenizer.json": table}), shape(260))

    assert ours.encode("abc", parse_special=True, is_start=True) == [259, 3 + ord("c") - 0x21]
    assert ours.notes[0].endswith("'abc' (id 260), '<pad>' (id 261)")

    cut = HFTokenizer(write(tmp_path / "cut", {"tokenizer.model": trained()}), shape(SIZE - 3))
    assert max(max(cut.encode(text, parse_special=False, is_start=True)) for text in HARD) < SIZE - 3
    assert len(cut.notes) == 1


def test_a_named_token_without_a_row_is_left_out_with_a_note(tmp_path: Path):
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": FAST | {"eos_token": "<|im_end|>"}}
    ours = HFTokenizer(write(tmp_path, files), shape(259, eos_token_id=2))

    assert ours.eos_ids == {2}
    assert ours.notes[0].endswith("ids 0 to 258: '<|im_end|>' (named, and without an id)")


@pytest.mark.parametrize(
    ("text", "ends", "note"),
    [
        (b'{"eos_token_id": [2, 128009]}', {2}, "generation_config.json: eos_token_id 128009 left out"),
        (b'{"eos_token_id": [2, null, "3", true]}', {2}, "eos_token_id None, '3', True left out"),
        (b'{"eos_token_id": -1}', {2}, "eos_token_id -1 left out: ids of the model are 0 to 299"),
        (b'{"eos_token_id": 2, "temperature": NaN, "max_length": Infinity}', {2}, None),
        (b'{"eos_token_id": null}', {2}, None),
        (b"", {2}, "left out: "),
        (b"[2]", {2}, "left out: "),
        (b'{"eos_token_id": [40, 2]', {2}, "left out: "),
        (b'{"eos_token_id": 40}', {2, 40}, None),
        (b'{"eos_token_id": [40.0, 2.5, NaN]}', {2, 40}, "eos_token_id 2.5, nan left out"),
    ],
)
def test_generation_config_is_advice(tmp_path: Path, text: bytes, ends: set[int], note: str | None):
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": FAST, "generation_config.json": text}
    ours = HFTokenizer(write(tmp_path, files), shape(300, eos_token_id=2))

    assert ours.eos_ids == ends
    assert len(ours.notes) == (note is not None)
    assert note is None or note in ours.notes[0]


def test_every_file_may_name_an_end_and_a_default_of_config_classes_is_none(tmp_path: Path):
    files = {
        "tokenizer.json": byte_level(BASE | IM | {261: flagged("<|a|>", False), 262: flagged("<|b|>")}),
        "tokenizer_config.json": FAST | {"eos_token": "<|a|>", "eot_token": "<|b|>"},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "generation_config.json": {"eos_token_id": [50]},
    }
    assert HFTokenizer(write(tmp_path, files), shape(300, eos_token_id=[51])).eos_ids == {50, 51, 260, 261, 262}

    words = byte_level({259: flagged("<|im_end|>")})  # ids 1 and 2 are pieces of text, as in vocabularies of tiktoken
    words["model"]["vocab"] = {text: i for i, text in enumerate(dict(sorted(words["model"]["vocab"].items())))}
    files = {"tokenizer.json": words, "generation_config.json": {"eos_token_id": 259}}
    assert HFTokenizer(write(tmp_path / "words", files), shape(300, eos_token_id=2)).eos_ids == {259}


@pytest.mark.parametrize(
    ("top", "inner", "ends"),
    [
        (260, 2, {2, 260}),
        (2, 260, {2, 260}),
        ([1, 260], None, {1, 260}),
        (None, [260], {260}),
        ([2, 260], [260, 262], {2, 260, 262}),
        (2, 2, {2}),
    ],
)
def test_the_ends_of_an_image_model_are_those_of_both_of_its_places(
    tmp_path: Path, top: object, inner: object, ends: set[int]
):
    tokens = BASE | {260: flagged("<|a|>", False), 262: flagged("<|b|>")}
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    config = {"model_type": "gemma3", "eos_token_id": top, "text_config": text | {"eos_token_id": inner}}
    folder = write(tmp_path, {"tokenizer.json": byte_level(tokens), "config.json": config})

    assert HFTokenizer(folder, read_config(folder)).eos_ids == ends


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("raw", [None, trained(user_defined_symbols="<|halt|>,Human:")])
def test_an_end_that_is_named_by_its_id_alone_is_no_text(tmp_path: Path, raw: bytes | None, place: str):
    first = 259 if raw is None else 3
    stated = {"eos_token_id": [2, first, first + 1]}
    words = byte_level(BASE | {259: flagged("<|halt|>", False), 260: flagged("Human:", False)})
    vocabulary = {"tokenizer.json": words} if raw is None else {"tokenizer.model": raw}
    files = vocabulary | {"tokenizer_config.json": NAMES} | ({place: stated} if "generation" in place else {})
    config = stated if place == "config.json" else {}
    ours = HFTokenizer(write(tmp_path, files), shape(2048, **config))

    assert ours.eos_ids == {2, first, first + 1}
    assert "<|halt|>" in ours.special_texts()
    assert ours.added_texts() == ["Human:"]
    assert first in ours.encode("a<|halt|>", parse_special=True, is_start=True)
    assert keeps(ours, "a<|halt|>b")


def test_names_that_transformers_keeps_apart_are_those_of_special_tokens(tmp_path: Path):
    names = FAST | {"model_specific_special_tokens": {"eot_token": "<|x|>"}}
    files = {"tokenizer.json": byte_level(BASE | {259: flagged("<|x|>", False)}), "tokenizer_config.json": names}
    ours = HFTokenizer(write(tmp_path, files), shape(300))

    assert ours.eos_ids == {2, 259}
    assert dict(ours.named_tokens)["eot_token"] == "<|x|>"


def test_settings_that_are_called_like_tokens_and_empty_names_are_none(tmp_path: Path):
    settings = {"add_bos_token": "true", "add_eos_token": "false", "pad_token": "", "eos_token": "</s>"}
    ours = HFTokenizer(write(tmp_path, {"tokenizer.json": byte_level(), "tokenizer_config.json": settings}), shape(300))

    assert set(ours.special_texts()) == {"<unk>", "<s>", "</s>"}
    assert dict(ours.named_tokens) == {"eos_token": "</s>"}
    assert ours.notes == ()


def test_a_word_that_is_named_as_padding_stays_a_word(tmp_path: Path):
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": FAST | {"pad_token": "!"}}
    ours = HFTokenizer(write(tmp_path, files), shape(300))

    assert "!" not in ours.special_texts()
    assert dict(ours.named_tokens)["pad_token"] == "!"


def test_marks_that_are_whole_pieces_of_the_vocabulary_count(tmp_path: Path):
    table = byte_level(more=("<|im_start|>", "<|im_end|>"))
    ours = HFTokenizer(write(tmp_path, {"tokenizer.json": table, "tokenizer_config.json": FAST}), shape(300))

    assert ours.encode("<|im_start|>a<|im_end|>", parse_special=True, is_start=True) == [259, 67, 260]
    assert ours.eos_ids == {2, 260}


def test_a_message_mark_of_harmony_ends_no_turn(tmp_path: Path):
    marks = {259: flagged("<|end|>"), 260: flagged("<|return|>"), 261: flagged("<|call|>")}
    ours = HFTokenizer(write(tmp_path, {"tokenizer.json": byte_level(BASE | marks)}), shape(300))
    phi = write(tmp_path / "phi", {"tokenizer.json": byte_level(BASE | {259: flagged("<|end|>", False)})})

    assert ours.eos_ids == {260, 261}
    assert HFTokenizer(phi, shape(300)).eos_ids == {259}


def test_merges_that_spell_a_special_token_do_not_make_one_of_letters(tmp_path: Path):
    table = byte_level(more=("</", "s>"))
    table["model"]["merges"] = ["< /", "s >", "</ s>"]
    ours = HFTokenizer(write(tmp_path, {"tokenizer.json": table}), shape(300))

    assert ours.encode("a</s>b", parse_special=True, is_start=True)[1] == 2
    assert keeps(ours, "a</s>b </s></s>")


def test_the_names_of_a_folders_tokens_are_those_of_transformers(tmp_path: Path):
    for number, name in enumerate(FOLDERS):
        folder = write(tmp_path / str(number), FOLDERS[name] | {"config.json": config()})
        ours = dict(HFTokenizer(folder, shape(300)).named_tokens)
        ours.pop("additional_special_tokens", None)  # which transformers 5 keeps apart

        assert ours == AutoTokenizer.from_pretrained(folder).special_tokens_map, name
