"""`tightrope plan`: from headers alone, what a model needs, what fits, and one line where it doesn't."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hf_folders import mixtral_8x7b, mixtral_lora, yi_34b
from test_cli import bundled_model

from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.memory import CARD_RESERVE, MEMORY_SHARE
from tightrope.server.cli.failures import UsageError
from tightrope.server.cli.main import main
from tightrope.server.cli.plan import parse_size


@pytest.fixture(scope="module")
def yi(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(yi_34b(tmp_path_factory.mktemp("models") / "yi-34b"))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the JSON printed, what went to stderr)."""
    status = main(["plan", *arguments, "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out), captured.err


def test_a_yi_34b_in_24_gib_is_told_to_hold_24000_tokens_with_q8_and_not_with_f16(
    yi: str, capsys: pytest.CaptureFixture[str]
):
    status, found, _ = planned(capsys, yi, "--memory=24GiB", "--max-model-len=24000")

    assert status == 0
    assert found["serve_cache"] == "q8"
    assert found["q8_largest_context"] >= 24_000 > found["f16_largest_context"]
    assert found["q8_bytes_per_token"] == 120 * 1024 * 34 / 32
    assert found["f16_bytes_per_token"] == 240 * 1024


def test_what_does_not_fit_is_one_line_with_what_would_and_status_1(yi: str, capsys: pytest.CaptureFixture[str]):
    status, found, stderr = planned(capsys, yi, "--memory=24GiB", "--max-model-len=24000", "--kv-cache=f16")

    assert status == 1
    assert (found["fits"], found["serve_cache"]) == (False, None)
    assert stderr == f"tightrope: {found['refusal']}\n"
    assert "take --kv-cache q8 or --kv-cache q4, or ask for at most" in stderr


def test_the_text_lists_the_three_caches_side_by_side_and_what_serve_would_do(
    yi: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", yi, "--memory=24GiB", "--max-model-len=24000"]) == 0

    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith(("q8", "q4", "f16"))}
    assert list(rows) == ["q8", "q4", "f16"]
    assert "127.5 KiB" in rows["q8"]
    assert "fit in 2.92 GiB" in rows["q8"]
    assert "would take 5.49 GiB" in rows["f16"]
    assert any("tokens as q8" in line for line in lines)
    assert any(line.strip().startswith("rope: no scaling") for line in lines)
    assert any(line.strip().startswith("tokenizer: the folder holds none") for line in lines)
    assert "EXL2, 4.6" in lines[0]


def test_a_card_is_named_by_what_its_driver_calls_free_beside_the_machines_memory(
    yi: str, capsys: pytest.CaptureFixture[str]
):
    arguments = (yi, "--device-memory=22.8GiB", "--memory=8GiB", "--max-model-len=24000")
    status, found, _ = planned(capsys, *arguments)

    assert status == 0
    assert (found["device"], found["fits"], found["serve_cache"]) == ("cuda", True, "q8")
    assert found["host_bytes"] == 2 * 64000 * 7168
    assert found["memory_bytes"] == int(22.8 * (1 << 30)) - CARD_RESERVE
    assert 256 <= found["serve_step_tokens"] <= 2048
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    left = 22.8 - CARD_RESERVE / (1 << 30)
    assert lines[1] == f"memory     {left:.2f} GiB on the card, all that is named but for a reserve"
    assert lines[2].endswith(", and 0.85 GiB in the machine's own memory")
    assert lines[3].endswith(f" at most, for steps of {found['serve_step_tokens']} tokens")


def test_a_gguf_file_is_planned_for_by_the_same_command(capsys: pytest.CaptureFixture[str]):
    options = ("--gguf-engine=llama.cpp", "--rope-scaling=yarn", "--rope-factor=2")
    status, found, _ = planned(capsys, str(bundled_model()), "--memory=1GiB", *options)

    assert status == 0
    assert (found["format"], found["window"], found["trained_len"]) == ("gguf", 16384, 8192)
    assert found["weight_bytes"] == read_header(bundled_model()).weight_bytes
    assert found["q8_bytes_per_token"] == found["f16_bytes_per_token"] * 17 / 32
    assert found["memory_bytes"] == 1 << 30


def test_a_gguf_file_on_cards_that_are_not_here_is_planned_by_their_sizes(capsys: pytest.CaptureFixture[str]):
    options = ("--gpu-layers=-1", "--memory=1GiB", "--max-model-len=4096")
    status, one, _ = planned(capsys, str(bundled_model()), *options, "--device-memory=2GiB")

    header = read_header(bundled_model())
    table = next(tensor.num_bytes for tensor in header.tensors if tensor.name == "token_embd.weight")
    assert status == 0
    assert (one["device"], one["host_bytes"]) == ("cuda", table)
    assert one["memory_bytes"] == (2 << 30) - CARD_RESERVE
    assert one["weight_bytes"] == header.weight_bytes  # its output is a copy of the table
    assert any(str(note).startswith("layers: 31 on CUDA0, ") for note in one["serve_notes"])

    status, two, _ = planned(capsys, str(bundled_model()), *options, "--device-memory=480MiB,1GiB", "--kv-cache=f16")
    assert status == 0
    assert any("on CUDA1, " in str(note) for note in two["serve_notes"])
    status, _, stderr = planned(capsys, str(bundled_model()), *options, "--device-memory=480MiB")
    assert status == 1
    assert "is free on CUDA0: " in stderr


def test_a_gguf_file_on_two_cards_has_a_line_for_each(capsys: pytest.CaptureFixture[str]):
    more = ("--gpu-layers=-1", "--memory=1GiB", "--max-model-len=4096", "--devices=2GiB,2GiB")
    _, even, _ = planned(capsys, str(bundled_model()), *more, "--tensor-split=1,1")
    _, uneven, _ = planned(capsys, str(bundled_model()), *more, "--tensor-split=3,1")
    _, rows, _ = planned(capsys, str(bundled_model()), *more, "--split-mode=row")
    _, none, _ = planned(capsys, str(bundled_model()), *more, "--split-mode=none")

    assert even["devices"] == rows["devices"] == ["CUDA0", "CUDA1"]
    assert none["devices"] == ["CUDA0"]
    assert even["device_layers"] == [16, 15]
    assert uneven["device_layers"] == [24, 7]
    for found in (even, uneven):
        assert sum(found["device_weight_bytes"]) == found["weight_bytes"]
        sizes = [found[f"device_{name}_bytes"] for name in ("weight", "cache", "workspace", "memory")]
        assert all(sum(taken) <= memory for *taken, memory in zip(*sizes, strict=True))
    assert main(["plan", str(bundled_model()), *more, "--tensor-split=3,1"]) == 0
    bars = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CUDA")]
    assert [re.search(r"\|(w+c*s*\.*)\|  (\d+) layers$", line)[2] for line in bars] == ["24", "7"]  # type: ignore[index]


def test_a_card_that_no_layer_is_put_on_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(bundled_model()), "--device-memory=24GiB"]) == 1
    assert "add --gpu-layers -1 for all" in capsys.readouterr().err


def test_without_a_size_it_is_the_free_memory_but_for_a_share(capsys: pytest.CaptureFixture[str]):
    _, found, _ = planned(capsys, str(bundled_model()))

    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < found["memory_bytes"] < MEMORY_SHARE * total
    assert found["fits"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("24G", 24 << 30), ("24 GB", 24 << 30), ("1.5g", 3 << 29), ("512MiB", 512 << 20),
     ("1073741824", 1 << 30), ("2T", 2 << 40)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "24", "-1GiB", "24XB", "nan", "infGiB", "1e9GiB", "9" * 400 + "GiB", "2048TiB", "٣GiB ", "1KiB"]
)
def test_an_absurd_size_is_refused_in_one_line_that_says_what_would_be_right(text: str):
    with pytest.raises(UsageError, match="--memory: should be a size from 1MiB to 1024TiB, such as 24GiB") as caught:
        parse_size(text)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["--memory", "much"], 2, "--memory: should be a size"),
        (["--device-memory", "22.8GiB,much"], 2, "--device-memory: should be a size"),
        (["--devices", "much"], 2, "--devices: should be a size"),
        (["--devices", "1GiB", "--device-memory", "1GiB"], 2, "--devices and --device-memory mean the same"),
        (["--tensor-split", "0,0"], 2, "--tensor-split: a card must get something"),
        (
            ["--device-memory", ",".join(["1GiB"] * 17)],
            2,
            "--device-memory: at most 16 cards can be planned for, not 17",
        ),
        (["--gpu-memory-fraction", "1.5"], 2, "--gpu-memory-fraction: input should be"),
        (["--rope-factor", "nan"], 2, "--rope-factor: input should be"),
        (["no-such.gguf"], 1, "no-such.gguf: no such file"),
        (
            ["--gguf-engine", "llama.cpp", "--rope-scaling", "dynamic", "--rope-factor", "2"],
            1,
            "can't be chosen for a GGUF file",
        ),
        (["--max-model-len", "999999999", "--memory", "1GiB"], 1, "ask for at most"),
    ],
)
def test_whatever_is_wrong_is_one_line(
    arguments: list[str], status: int, part: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", *arguments]) == status

    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert part in stderr


def test_a_broken_scaling_in_a_folder_is_one_line_with_file_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = yi_34b(tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "spiral", "factor": 2}}))

    assert main(["plan", str(folder), "--memory=24GiB"]) == 1

    assert capsys.readouterr().err.startswith("tightrope: config.json: rope_scaling.rope_type is 'spiral'; known are")


@pytest.mark.parametrize("option", ["--tensor-split=3,1", "--split-mode=row"])
def test_options_of_llama_cpp_are_refused_with_a_folder(option: str, yi: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", yi, "--memory=24GiB", option]) == 1
    assert "is of GGUF files" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gpu-layers=-1", "--gpu-layers=20", "--n-cpu-moe=4"])
def test_options_for_a_files_layers_are_refused_by_name_with_a_folder(
    option: str, yi: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", yi, "--memory=24GiB", option]) == 1
    assert capsys.readouterr().err.startswith(f"tightrope: {option.replace('=', ' ')}: only a GGUF file's layers")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--n-cpu-moe=4"], "n_cpu_moe is 4, but no layer is on a card; add --gpu-layers, or leave it out"),
        (["--n-cpu-moe=4", "--gpu-layers=-1"], "n_cpu_moe is 4, but the model has no experts; leave it out"),
    ],
)
def test_experts_that_cannot_be_left_with_the_host_are_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", str(bundled_model()), "--memory=24GiB", *options]) == 1
    assert capsys.readouterr().err.endswith(f"{reason}\n")


def test_the_experts_of_a_mixtral_8x7b_are_counted_all_and_its_adapter_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain, packed = mixtral_8x7b(tmp_path / "bf16"), mixtral_8x7b(tmp_path / "gptq", is_gptq=True)
    adapter = mixtral_lora(tmp_path / "adapter", rank=32)

    bf16, gptq, adapted = (
        planned(capsys, str(folder), "--memory=120GiB", "--max-model-len=4096", *more)[1]["weight_bytes"]
        for folder, more in ((plain, ()), (packed, ()), (packed, (f"--lora=mine={adapter}",)))
    )

    assert isinstance(bf16, int)
    assert isinstance(gptq, int)
    assert bf16 / 2 == pytest.approx(46.7e9, rel=1e-3)  # its card's number of parameters
    expert = 3 * 4096 * 14336
    assert bf16 / 2 - 32 * (8 - 2) * expert == pytest.approx(12.9e9, rel=2e-3)  # those of a token
    rest = (2 * 32000 + 32 * (8 + 2) + 1) * 4096  # embedding and head, routers and norms, in 16 bits
    assert gptq == 2 * rest + (bf16 / 2 - rest) * (4 + 16 / 128) / 8  # codes and scales
    sizes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 24]
    assert adapted == gptq + 32 * 2 * 32 * sum(map(sum, sizes))  # layers, bytes, rank


def test_a_chat_template_that_serve_refuses_is_refused_for_a_plan_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = yi_34b(tmp_path / "yi-34b")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")

    assert main(["plan", str(folder), "--memory=24GiB"]) == 1
    assert "chat_template.jinja: can't be read as UTF-8 text" in capsys.readouterr().err
