"""The comparison of quantized files: what its ratios are of, and which of them have a bar."""

from pathlib import Path

import pytest

from bench.peers import Setup
from bench.quant_models import BF16, LLAMA, WRITER, contestants, verdicts_of
from bench.stats import Sample

pytestmark = pytest.mark.quick


def sample(server: str, speed: float, round: int = 0, other_cores: float = 0.0) -> Sample:
    return Sample(server, "1 stream", round, {"decode_tokens_per_s": speed, "other_cores": other_cores})


def test_every_form_is_compared_with_llama_cpp_and_bf16_and_two_of_them_have_bars() -> None:
    servers = {BF16: 40.0, "exl2-4.0bpw": 80.0, "gptq-4bit-128g": 50.0, "nf4": 60.0, LLAMA: 100.0}
    found = {(v["name"], v["over"]): v for v in verdicts_of([sample(*pair) for pair in servers.items()])}

    assert {key: verdict["value"] for key, verdict in found.items()} == {
        ("exl2-4.0bpw", LLAMA): 0.8,
        ("exl2-4.0bpw", BF16): 2.0,
        ("gptq-4bit-128g", LLAMA): 0.5,
        ("gptq-4bit-128g", BF16): 1.25,
        ("nf4", LLAMA): 0.6,
        ("nf4", BF16): 1.5,
    }
    assert [verdict.get("met") for verdict in found.values()] == [True, True, False, False, None, None]


def test_rounds_in_which_others_were_at_work_do_not_count() -> None:
    quiet = [sample(LLAMA, 100.0), sample("nf4", 90.0)]
    busy = [sample(LLAMA, 2.0, 1, 1.0), sample("nf4", 60.0, 1, 1.0), sample(LLAMA, 2.0, 2, 1.0), sample("nf4", 80.0, 2)]

    [verdict] = verdicts_of(quiet + busy)

    assert (verdict["value"], verdict["max"]) == (0.9, 0.9)


def test_each_folder_has_a_server_of_its_own_beside_llama_cpp(tmp_path: Path) -> None:
    peers = contestants({BF16: tmp_path / "bf16", "nf4": tmp_path / "nf4"})
    commands = {peer.name: peer.arguments(Setup(tmp_path / "model.gguf"), 1) for peer in peers}

    assert str(tmp_path / "nf4") in commands["nf4"]
    assert str(tmp_path / "bf16") in commands[BF16]
    assert str(tmp_path / "model.gguf") in commands[LLAMA]


def test_the_script_that_writes_the_models_is_there():
    assert WRITER.is_file()
