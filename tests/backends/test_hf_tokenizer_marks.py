"""Which tokens begin a prompt, end a turn, and are marks, as a folder's files and its chat template say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_models import smollm2_bf16
from small_tokenizers import LLAMA_SHAPE, SMALL_SHAPE, copied, joined, llama_like, small, write

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.hf.text.tokenizer import HFTokenizer

ADDS_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_like(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> HFTokenizer:
    return HFTokenizer(llama_folder, LLAMA_SHAPE)


def test_special_tokens_are_parsed_only_when_asked_for():
    smollm2 = HFTokenizer(smollm2_bf16(), read_config(smollm2_bf16()))
    parsed = smollm2.encode("<|im_start|>user", parse_special=True, is_start=True)
    plain = smollm2.encode("<|im_start|>user", parse_special=False, is_start=True)

    assert smollm2.is_special(parsed[0])
    assert not any(map(smollm2.is_special, plain))
    assert joined(smollm2, parsed) == joined(smollm2, plain) == b"<|im_start|>user"


def test_control_pieces_are_special_and_user_defined_ones_are_always_found(llama: HFTokenizer):
    found = llama.encode("[INST]<tool></s>", parse_special=True, is_start=False)
    plain = llama.encode("[INST]<tool></s>", parse_special=False, is_start=False)

    assert [llama.token_bytes(i) for i in found] == [b"[INST]", b"<tool>", b"</s>"]
    assert [llama.is_special(i) for i in found] == [True, False, True]
    assert found[1] in plain
    assert not any(map(llama.is_special, plain))
    assert set(llama.special_texts()) == {"<unk>", "<s>", "</s>", "[INST]"}


def test_a_llamas_prompts_start_with_bos(llama: HFTokenizer):
    assert (llama.bos_id, llama.adds_bos, llama.eos_ids) == (1, True, {2})


def test_tokens_that_were_added_later_follow_the_sentencepiece_ones(llama_folder: Path, tmp_path: Path):
    folder = copied(llama_folder, tmp_path)
    write(folder, "added_tokens.json", {"<|im_end|>": 560, "<extra>": 561})
    added = {"560": {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>", "special": True}}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": added})

    tokenizer = HFTokenizer(folder, LLAMA_SHAPE)

    assert tokenizer.encode("<|im_end|><extra>", parse_special=True, is_start=False) == [560, 561]
    assert 560 in tokenizer.eos_ids
    assert (tokenizer.is_special(560), tokenizer.is_special(561)) == (True, False)


@pytest.mark.parametrize(
    ("post_processor", "config", "expected"),
    [
        (ADDS_BOS, {}, (0, True)),
        (ADDS_BOS, {"bos_token": "</s>"}, (0, True)),
        (ADDS_BOS, {"add_bos_token": False, "bos_token": "<s>"}, (0, False)),
        (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, (0, True)),
        (None, {"bos_token": "<s>"}, (0, False)),
        (None, {"bos_token": None}, (None, False)),
        (None, {}, (None, False)),
    ],
)
def test_bos_is_what_the_settings_say_or_else_the_post_processor(
    tmp_path: Path, post_processor: object, config: object, expected: tuple[int | None, bool]
):
    write(tmp_path, "tokenizer_config.json", config)
    tokenizer = small(tmp_path, post_processor=post_processor)

    assert (tokenizer.bos_id, tokenizer.adds_bos) == expected


@pytest.mark.parametrize(
    ("generation", "config", "named", "ends"),
    [
        ({"eos_token_id": [1, 4]}, {"eos_token_id": 5}, None, {1, 2, 4, 5}),
        ({"eos_token_id": 1}, {}, None, {1, 2}),
        ({}, {"eos_token_id": [5, 4]}, None, {2, 4, 5}),
        ({"eos_token_id": 4}, {"eos_token_id": 3}, None, {2, 3, 4}),
        (None, {"eos_token_id": 5}, "</s>", {1, 2, 5}),
        (None, {}, None, {2}),
    ],
)
def test_every_end_token_ends_a_turn(tmp_path: Path, generation: Any, config: Any, named: str | None, ends: set[int]):  # noqa: ANN401
    if generation is not None:
        write(tmp_path, "generation_config.json", generation)
    write(tmp_path, "special_tokens_map.json", {"eos_token": named})

    assert small(tmp_path, replace(SMALL_SHAPE, raw=config)).eos_ids == ends


def test_an_added_text_becomes_a_mark_when_the_chat_template_says_so(tmp_path: Path):
    tokenizer = small(tmp_path)
    assert tokenizer.added_texts() == ["<think>"]
    assert tokenizer.encode("<think>", parse_special=False, is_start=True) == [3]

    tokenizer.set_marks(["<think>", "<unknown>", "a"], ["<think>", "a"])

    assert tokenizer.added_texts() == []
    assert tokenizer.encode("<think>a", parse_special=True, is_start=True) == [3, 4]
    assert 3 not in tokenizer.encode("<think>", parse_special=False, is_start=True)
    assert [tokenizer.is_special(i) for i in (2, 3, 4)] == [True, True, False]
    assert "<think>" in tokenizer.special_texts()
    assert tokenizer.eos_ids == {2, 3}
    assert tokenizer.token_bytes(3) == b"<think>"


def test_a_user_defined_piece_becomes_a_mark_when_the_chat_template_says_so(llama_folder: Path):
    tokenizer = HFTokenizer(llama_folder, LLAMA_SHAPE)
    assert tokenizer.added_texts() == ["<tool>"]
    [tool] = tokenizer.encode("<tool>", parse_special=False, is_start=False)

    tokenizer.set_marks(["<tool>"], ["</s>"])

    assert tokenizer.encode("<tool>", parse_special=True, is_start=False) == [tool]
    plain = tokenizer.encode("<tool>", parse_special=False, is_start=False)
    assert tool not in plain
    assert joined(tokenizer, plain) == b"<tool>"
    assert tokenizer.eos_ids == {2}
