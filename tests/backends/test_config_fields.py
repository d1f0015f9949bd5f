"""Values of config.json that the arithmetic doesn't need stop no model, and those that it needs are read as meant."""

from pathlib import Path
from typing import Any

import pytest
from test_hf_config import LLAMA, folder_of
from test_hf_loader import PROMPT, TINY, assert_close, load, logits, write
from transformers import LlamaConfig

from tightrope.backends.files.config_fields import as_meant, computing
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.hf.load.skeleton import build_skeleton
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import RopeSettings

pytestmark = pytest.mark.quick

# of published files: a padding token beyond the vocabulary, ids as texts or lists, settings of training and generation
NEEDLESS: dict[str, dict[str, Any]] = {
    "padding beyond the vocabulary": {"pad_token_id": TINY["vocab_size"]},
    "padding of another model": {"pad_token_id": 128004},
    "padding below zero": {"pad_token_id": -1},
    "padding as a text": {"pad_token_id": "<pad>"},
    "padding as a list": {"pad_token_id": [0]},
    "ends with a null": {"eos_token_id": [2, None]},
    "an end as a text": {"eos_token_id": "</s>"},
    "a beginning as a list": {"bos_token_id": [1]},
    "a start for a decoder": {"decoder_start_token_id": "x"},
    "what a call gives back": {"return_dict": False, "output_attentions": True, "output_hidden_states": True},
    "settings of training": {"use_cache": "false", "initializer_range": 1, "gradient_checkpointing": True},
    "labels": {"id2label": None, "label2id": None, "problem_type": "chat"},
}


@pytest.mark.parametrize("fields", NEEDLESS.values(), ids=NEEDLESS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers', about ids outside the vocabulary
def test_a_value_that_the_arithmetic_does_not_need_stops_no_model(tmp_path: Path, fields: dict[str, Any]):
    folder = folder_of(tmp_path, LLAMA | fields)
    shape = read_config(folder)

    model = build_skeleton(folder, shape, resolve_rope(shape.raw, RopeSettings(), 0))

    assert model.config.hidden_size == LLAMA["hidden_size"]
    assert shape.raw.items() >= {k: v for k, v in fields.items() if "eos" in k}.items()  # for the tokenizer


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_model_whose_padding_has_no_row_has_the_logits_of_transformers(tmp_path: Path, family: str):
    special = {"head_dim": 16, "query_pre_attn_scalar": 16} if family == "gemma2" else {}
    untouched = write(tmp_path, family, **special)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"pad_token_id": 0', '"pad_token_id": 90'))
    assert read_config(tmp_path).raw["pad_token_id"] == TINY["vocab_size"]

    assert_close(logits(load(tmp_path), tmp_path), untouched, PROMPT)


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ({"vocab_size": 512.0}, {"vocab_size": 512}),
        ({"rms_norm_eps": 1}, {"rms_norm_eps": 1.0}),
        ({"attention_bias": None, "mlp_bias": None, "hidden_act": None}, {}),
        ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": None, "num_key_value_heads": None}),
        ({"attention_dropout": 0}, {"attention_dropout": 0}),
        ({"vocab_size": 512.5, "mlp_bias": "yes"}, {"vocab_size": 512.5, "mlp_bias": "yes"}),  # for others to refuse
        ({"of_no_class": None}, {"of_no_class": None}),
    ],
)
def test_values_are_read_as_the_class_declares_them(stated: dict[str, Any], meant: dict[str, Any]):
    found = as_meant(stated, LlamaConfig.__annotations__)

    assert found == meant
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in meant.items()}


def test_caps_of_logits_may_be_whole_numbers_and_sizes_floats(tmp_path: Path):
    gemma = {"model_type": "gemma2", "final_logit_softcapping": 30, "attn_logit_softcapping": 50, "head_dim": 16.0}
    shape = read_config(folder_of(tmp_path, LLAMA | gemma | {"max_position_embeddings": 2048.0}))

    assert (shape.head_dim, shape.trained_len) == (16, 2048)
    assert shape.raw["final_logit_softcapping"] == 30.0


def test_only_a_padding_that_is_a_whole_number_can_have_a_say():
    assert computing({"pad_token_id": 3, "eos_token_id": 2, "hidden_size": 4}) == {"pad_token_id": 3, "hidden_size": 4}
    assert computing({"pad_token_id": True}) == computing({"pad_token_id": None}) == {}
