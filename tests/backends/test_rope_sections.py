"""RoPE sections as published files have them: which original window counts, and which window is served."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rope_bounds import FACTOR, frequencies_off
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.hf.host_workspace import HostWorkspace
from tightrope.backends.hf.plan import make_plan
from tightrope.backends.hf.room import host_room
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import ModelSettings, RopeSettings

pytestmark = pytest.mark.quick

ORIGINAL = "original_max_position_embeddings"
FAMILIES = {
    "llama": (LlamaConfig, LlamaRotaryEmbedding),
    "phi3": (Phi3Config, Phi3RotaryEmbedding),
    "gemma3_text": (Gemma3TextConfig, Gemma3RotaryEmbedding),
}
originals = st.sampled_from([None, 64, 200, 512, 1024])
factors = st.floats(1, 16).map(lambda x: round(x, 2))
lists = st.lists(st.floats(1, 8), min_size=16, max_size=16)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of any kind of scaling, in old or new style, with an original window in it, beside it, or both."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope"]))
    family = draw(st.sampled_from(["llama", "phi3"] if kind in ("default", "longrope") else ["llama", "gemma3_text"]))
    if kind == "dynamic":  # Gemma's own module has no dynamic scaling of single kinds of layers
        family = "llama"
    section: dict[str, Any] = {draw(st.sampled_from(["type", "rope_type"])): kind}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        section["factor"] = draw(factors)
    if kind == "llama3":
        section |= {"low_freq_factor": draw(st.floats(0.5, 2)), "high_freq_factor": draw(st.floats(3, 8))}
    if kind == "longrope":
        section |= {"long_factor": draw(lists), "short_factor": draw(lists)}
    inner, outer = draw(originals), draw(originals)
    section |= {ORIGINAL: inner} if inner is not None and kind != "default" else {}
    theta = draw(st.sampled_from([1e4, 5e5, 1e6]))
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_hidden_layers": 6,
        "max_position_embeddings": draw(st.sampled_from([512, 2048])),
        "pad_token_id": 0,
    }
    config |= {} if outer is None else {ORIGINAL: outer}
    if family == "llama" and draw(st.booleans()):
        return config | {"rope_parameters": {**section, "rope_theta": theta}}
    return config | {"rope_theta": theta, "rope_scaling": section}


@given(configs(), st.integers(1, 3000))
def test_frequencies_are_those_of_transformers_own_module(raw: dict[str, Any], length: int):
    config_class, module_class = FAMILIES[raw["model_type"]]
    module = module_class(config_class.from_dict(json.loads(json.dumps(raw))))
    specs = resolve_rope(raw, RopeSettings(), 0)

    for name, spec in specs.items():
        kind = {} if name == "default" else {"layer_type": name}
        prefix = "" if name == "default" else f"{name}_"
        module(torch.zeros(1), torch.arange(length)[None], **kind)
        inv_freq, attention_factor = spec.frequencies(length)
        off = np.abs(inv_freq.astype(np.float64) - getattr(module, f"{prefix}inv_freq").double().numpy())
        assert (off <= frequencies_off(spec, length)).all()
        assert attention_factor == pytest.approx(getattr(module, f"{prefix}attention_scaling"), rel=FACTOR)


def windows(section: dict[str, Any], **fields: object) -> tuple[int, int]:
    """Trained and served window of a Llama."""
    raw = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "rope_scaling": section, **fields}
    spec = resolve_rope(raw, RopeSettings(), 0)["default"]
    return spec.trained_len, spec.window


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        ({"type": "yarn", "factor": 4.0}, {ORIGINAL: 512}, (512, 2048)),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 1024}, {ORIGINAL: 512}, (512, 2048)),
        ({"type": "yarn"}, {ORIGINAL: 512}, (512, 2048)),
        ({"type": "linear", "factor": 4.0, ORIGINAL: 512}, {}, (512, 2048)),
        ({"type": "linear", "factor": 4.0}, {ORIGINAL: 512}, (512, 2048)),
        ({"type": "dynamic", "factor": 4.0, ORIGINAL: 512}, {}, (512, 2048)),
        ({"type": "linear", "factor": 4.0, ORIGINAL: 2048}, {}, (2048, 8192)),
        ({"type": "linear", "factor": 4.0}, {}, (2048, 8192)),
        ({"type": "dynamic", "factor": 4.0}, {}, (2048, 8192)),
        ({"type": "ntk", "factor": 4.0}, {ORIGINAL: 512}, (512, 2048)),
        (
            {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            {ORIGINAL: 512},
            (512, 2048),
        ),
    ],
)
def test_an_original_window_counts_under_every_kind_and_first_where_it_stands_beside_the_section(
    section: dict[str, Any], fields: dict[str, Any], expected: tuple[int, int]
):
    assert windows(section, max_position_embeddings=2048, **fields) == expected


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
LINEAR = {"type": "linear", "factor": 4.0}
DYNAMIC = {"type": "dynamic", "factor": 4.0}


def folder_of(folder: Path, files: dict[str, dict[str, object]], **fields: object) -> Path:
    """A model's folder with a max_position_embeddings of 4096, and further JSON files."""
    config = LLAMA | {"max_position_embeddings": 4096} | fields
    for name, content in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def planned(folder: Path, max_model_len: int = 0) -> tuple[int, tuple[str, ...]]:
    """The window that is served, and what is said about windows at the start."""
    settings, shape = ModelSettings(max_model_len=max_model_len), read_config(folder)
    plan = make_plan(settings, shape, host_room(settings, HostWorkspace(settings, shape), 0, 1 << 44))
    return plan.window, tuple(note for note in plan.notes if note.startswith("window:"))


TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"


@pytest.mark.parametrize("section", [LINEAR, DYNAMIC], ids=["linear", "dynamic"])
@pytest.mark.parametrize(
    ("config", "files", "window"),
    [
        ({}, {}, 16384),
        ({"max_sequence_length": 4096}, {}, 4096),
        ({"max_sequence_length": 16384}, {}, 16384),
        ({"model_max_length": 4096}, {}, 4096),
        ({}, {TOKENIZER: {"model_max_length": 4096}}, 4096),
        ({}, {TOKENIZER: {"model_max_length": 16384}}, 16384),
        ({}, {GENERATION: {"max_length": 4096}}, 4096),
        ({}, {GENERATION: {"max_length": 4096.0}}, 4096),
        ({}, {GENERATION: {"max_length": 4096, "temperature": float("nan")}}, 4096),
        ({}, {GENERATION: {"max_length": float("nan")}, TOKENIZER: {"model_max_length": float("inf")}}, 16384),
        ({}, {TOKENIZER: {"model_max_length": 10**30}, GENERATION: {"max_length": 20}}, 16384),
        ({"max_sequence_length": 2048}, {TOKENIZER: {"model_max_length": True}}, 16384),
        ({}, {GENERATION: {"max_length": "4096"}, TOKENIZER: {"model_max_length": None}}, 16384),
    ],
)
def test_other_lengths_tell_whether_the_window_is_stretched_already(
    tmp_path: Path, section: dict[str, Any], config: dict[str, Any], files: dict[str, Any], window: int
):
    folder = folder_of(tmp_path, files, rope_scaling=section, **config)

    assert planned(folder) == (window, ())


def test_lengths_that_disagree_serve_the_smaller_window_and_are_named(tmp_path: Path):
    files = {TOKENIZER: {"model_max_length": 4096}, GENERATION: {"max_length": 16384}}
    folder = folder_of(tmp_path, files, rope_scaling=LINEAR, max_sequence_length=16384)

    assert planned(folder) == (
        4096,
        (
            "window: 4096 tokens by tokenizer_config.json's model_max_length, 16384 by config.json's "
            "max_sequence_length and generation_config.json's max_length; the smaller one is served unless "
            "--max-model-len says otherwise",
        ),
    )


def test_the_wish_for_a_window_wins_over_every_file(tmp_path: Path):
    files = {TOKENIZER: {"model_max_length": 4096}, GENERATION: {"max_length": 16384}}
    folder = folder_of(tmp_path, files, rope_scaling=LINEAR)

    assert planned(folder, 12000) == (12000, ("window: 12000 tokens, more than the 4096 that the model is made for",))
    assert planned(folder, 3000) == (3000, ())


def test_the_original_window_of_a_section_leaves_nothing_to_other_lengths(tmp_path: Path):
    files = {TOKENIZER: {"model_max_length": 4096}}
    folder = folder_of(tmp_path, files, rope_scaling={**LINEAR, ORIGINAL: 4096})

    assert planned(folder) == (16384, ())


@pytest.mark.parametrize(
    "section", [None, {"type": "yarn", "factor": 48.828125, ORIGINAL: 4096}], ids=["no scaling", "yarn"]
)
def test_lengths_of_training_say_nothing_without_linear_or_dynamic_scaling(tmp_path: Path, section: dict[str, Any]):
    files = {TOKENIZER: {"model_max_length": 4096}, GENERATION: {"max_length": 4096}}
    fields = {"max_position_embeddings": 200_000, "max_sequence_length": 4096, "rope_scaling": section}

    assert planned(folder_of(tmp_path, files, **fields)) == (200_000, ())


def test_files_that_cannot_be_read_give_no_length(tmp_path: Path):
    folder = folder_of(tmp_path, {}, rope_scaling=LINEAR)
    (folder / TOKENIZER).write_text("{")
    (folder / GENERATION).write_text("[4096]")

    assert planned(folder) == (16384, ())
