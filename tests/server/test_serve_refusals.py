"""Model folders that can't be: `serve` says in one line which file and which field, and ends before it takes memory.

What each reader refuses is tested beside it; here a refusal goes all the way, from the engine's process to the status.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_folders import YI_34B, yi_34b
from hf_models import smollm2_bf16
from real_server import clean_environment
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

MOST_MIB = 1200  # of libraries, of a process that has loaded torch and transformers; the model would take 19 GiB

# Runs the command and prints its status and the most memory in MiB that a process of its own held.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""


def serve(folder: Path, *options: str) -> tuple[int, int, str]:
    """(exit status, most memory in MiB, what went to stderr)."""
    tightrope = [sys.executable, "-m", "tightrope", "serve", str(folder), "--port=0", *options]
    command = [sys.executable, "-c", MEASURED, *tightrope]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=600)
    status, most = map(int, result.stdout.split())
    return status, most, result.stderr


def assert_refused(folder: Path, line: str) -> None:
    """One line that begins so after the folder's name, status 1, and no memory taken."""
    status, most, stderr = serve(folder)

    assert status == 1
    assert stderr.startswith(f"tightrope: {folder}/{line}")
    assert stderr.count("\n") == 1
    assert most < MOST_MIB


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"num_key_value_heads": 9}, "num_attention_heads is 56, not a multiple of num_key_value_heads 9"),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "rope_scaling.factor is nan; it must be",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_config_that_can_not_be_is_refused_before_19_gib_are_read(
    tmp_path: Path, fields: dict[str, object], line: str
):
    folder = yi_34b(tmp_path / "yi")
    (folder / "config.json").write_text(json.dumps(YI_34B | fields))

    assert_refused(folder, f"config.json: {line}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_bf16() / name, folder / name)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    return folder


def small_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def overlapping(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    begin, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [begin - 4, end - 4]
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        pytest.param(
            small_vocabulary,
            "tokenizer.json: token 'ectable' has id 49151, but vocab_size in config.json is 100",
            marks=pytest.mark.slow,
        ),
        (not_a_number, "model.safetensors: tensor 'model.norm.weight' holds NaN; weights must be finite"),
        pytest.param(
            overlapping,
            "model.safetensors: tensor 'model.norm.weight' overlaps the one before it",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_weights_and_tokenizers_that_can_not_be_are_refused(
    tmp_path: Path, tiny: Path, spoil: Callable[[Path], None], line: str
):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    spoil(folder)

    assert_refused(folder, line)


def test_a_card_that_is_asked_for_and_is_not_there_is_refused_in_one_line(tiny: Path):
    status, _, stderr = serve(tiny, "--device=cuda:99")

    assert status == 1
    assert stderr.startswith("tightrope: --device cuda:99: ")
    assert stderr.count("\n") == 1


def test_a_template_that_reaches_for_pythons_insides_is_refused_with_its_line(tiny: Path, tmp_path: Path):
    folder = shutil.copytree(tiny, tmp_path / "hostile")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}\n{{ messages.__class__.__base__ }}\n")

    status, _, stderr = serve(folder)

    assert status == 1
    assert stderr.splitlines()[-1] == (
        "tightrope: the chat template reaches for something that is forbidden: __base__ in line 2; "
        "choose another with --chat-template"
    )
    assert "Traceback" not in stderr
