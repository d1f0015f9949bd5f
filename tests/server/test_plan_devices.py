"""`tightrope plan --devices`: what each of several devices holds, from headers alone, on a machine without a card."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hf_folders import YI_34B, awq, bf16, gptq, mixtral_8x7b, nf4, yi_34b
from test_cli import bundled_model

from tightrope.backends.memory import CARD_RESERVE
from tightrope.server.cli.main import main

GIB = 1 << 30
YI_200K = YI_34B | {"max_position_embeddings": 200_000, "rope_theta": 5_000_000.0}
SHORT = YI_200K | {"num_hidden_layers": 6}
FORMATS: dict[str, Callable[[Path], Path]] = {
    "bf16": partial(bf16, config=SHORT),
    "GPTQ": partial(gptq, config=SHORT),
    "EXL2": partial(yi_34b, layers=6),
    "AWQ": partial(awq, config=SHORT),
    "nf4": partial(nf4, config=SHORT),
    "Mixtral-GPTQ": partial(mixtral_8x7b, is_gptq=True, layers=6),
}
LISTS = ("devices", "device_memory_bytes", "device_weight_bytes", "device_cache_bytes", "device_workspace_bytes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(write(folder / name)) for name, write in FORMATS.items()}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the JSON printed, what went to stderr)."""
    status = main(["plan", *arguments, "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out), captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an end with a reason."""
    assert main(["plan", *arguments]) != 0
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    return stderr


def test_yi_34b_in_bf16_on_two_cards_of_47_gib_is_planned_as_its_model_card_rents_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A6000s: 64 GiB of weights, half on each, and the cache's heads half on each."""
    status, found, _ = planned(
        capsys, str(bf16(tmp_path, YI_200K)), "--memory=64GiB", "--devices=47GiB,47GiB", "--tensor-parallel=2"
    )

    assert status == 0
    assert [len(found[name]) for name in LISTS] == [2] * 5
    assert found["devices"] == ["cuda:0", "cuda:1"]
    assert found["device_memory_bytes"] == [47 * GIB - CARD_RESERVE] * 2
    linears = 60 * (2 * 7168 * 7168 + 2 * 1024 * 7168 + 3 * 7168 * 20480) + 64000 * 7168
    for weights in found["device_weight_bytes"]:
        assert linears <= weights <= linears + (256 << 20)  # two bytes for half of them; norms, and whole blocks
    assert found["weight_bytes"] == sum(found["device_weight_bytes"])
    for memory, *taken in zip(*(found[name] for name in LISTS[1:]), strict=True):
        assert sum(taken) <= memory
    assert found["q8_bytes_per_token"] == 120 * 1024 * 34 / 32
    assert found["q8_largest_context"] > 100_000
    assert found["q4_largest_context"] > 1.7 * found["q8_largest_context"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("way", ["--tensor-parallel=2", "--gpu-split=auto"])
def test_every_format_is_planned_over_two_devices(
    name: str, way: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    more = ("--memory=64GiB", "--max-model-len=4096")
    one = planned(capsys, folders[name], *more, "--devices=140GiB")[1]
    each = f"{0.55 * one['weight_bytes'] / GIB + 1.3:.2f}GiB"  # too little for the whole
    status, found, _ = planned(capsys, folders[name], *more, f"--devices={each},{each}", way)

    assert (status, found["fits"], found["window"]) == (0, True, 4096)
    assert found["q8_bytes_per_token"] == one["q8_bytes_per_token"]
    rounded = 4 << 20  # of the blocks that torch's allocator takes
    assert one["weight_bytes"] - rounded <= found["weight_bytes"] <= 1.02 * one["weight_bytes"] + (64 << 20)
    assert len(found["devices"]) == 2
    assert sum(found["device_cache_bytes"]) == found["serve_cache_bytes"]
    if way == "--tensor-parallel=2":
        first, second = found["device_weight_bytes"]
        assert first == pytest.approx(second, rel=0.01)
        assert found["device_layers"] == [None, None]
    else:
        assert sum(found["device_layers"]) == 6


def test_a_model_in_layers_tells_where_each_lies_and_that_recordings_are_off(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    more = ("--memory=64GiB", "--devices=3.2GiB,3GiB", "--gpu-split=auto", "--max-model-len=8192")
    status, found, _ = planned(capsys, folders["GPTQ"], *more, "--kv-cache-tokens=65536")

    assert status == 0
    assert found["devices"] == ["cuda:0", "cuda:1"]
    assert sum(found["device_layers"]) == 6
    assert found["device_layers"][0] > found["device_layers"][1] > 0
    layers, graphs = (note for note in found["serve_notes"] if note.startswith(("layers: ", "graphs: ")))
    assert re.match(r"layers: \d+ on cuda:0, \d+\.\d\d of 2\.89 GiB; \d+ on cuda:1, \d+\.\d\d of 2\.69 GiB", layers)
    assert graphs == "graphs: off, as a step spans several devices"


def test_gib_that_are_given_are_what_each_card_takes(folders: dict[str, str], capsys: pytest.CaptureFixture[str]):
    more = ("--memory=64GiB", "--devices=12GiB,12GiB", "--gpu-split=2.5,6", "--max-model-len=8192")
    _, found, _ = planned(capsys, folders["GPTQ"], *more, "--kv-cache-tokens=65536")

    assert found["device_memory_bytes"] == [5 * GIB // 2, 6 * GIB]
    for memory, *taken in zip(*(found[name] for name in LISTS[1:]), strict=True):
        assert sum(taken) <= memory


def test_layers_that_no_card_holds_stay_on_the_cpu(folders: dict[str, str], capsys: pytest.CaptureFixture[str]):
    more = ("--memory=64GiB", "--devices=2.4GiB", "--gpu-split=auto", "--max-model-len=4096")
    status, found, _ = planned(capsys, folders["GPTQ"], *more)

    assert status == 0
    assert found["devices"] == ["cpu", "cuda:0"]
    assert found["device_layers"] == [3, 3]
    assert found["q8_largest_context"] >= 4096
    assert found["host_bytes"] == found["device_weight_bytes"][0]
    assert any(note.startswith("hidden states: float32 on the CPU") for note in found["serve_notes"])
    assert "GiB more than" in refused(capsys, folders["GPTQ"], *more[1:], "--memory=1GiB")


def test_without_a_flag_a_model_that_one_card_does_not_hold_goes_over_all_that_are_alike(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    more = ("--memory=64GiB", "--max-model-len=4096")
    one = planned(capsys, folders["GPTQ"], *more, "--devices=12GiB,12GiB")[1]
    ranks = planned(capsys, folders["GPTQ"], *more, "--devices=3GiB,3GiB")[1]
    layers = planned(capsys, folders["GPTQ"], *more, "--devices=2.2GiB,3.2GiB")[1]

    assert one["devices"] == []
    assert ranks["device_layers"] == [None, None]
    assert sum(layers["device_layers"]) == 6


@pytest.mark.parametrize(
    ("devices", "memory"), [("12GiB", 12 * GIB), ("3GiB,4GiB,12GiB,5GiB", 12 * GIB), ("3GiB,4GiB,2.4GiB", 2.4 * GIB)]
)
def test_the_card_that_is_asked_for_is_named_and_its_size_counts(
    devices: str, memory: float, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    more = ("--memory=64GiB", f"--devices={devices}", "--device=cuda:2", "--max-model-len=4096")
    alone = planned(capsys, folders["GPTQ"], *more, "--tensor-parallel=1")[1]
    layers = planned(capsys, folders["GPTQ"], *more, "--gpu-split=auto")[1]

    assert alone["memory_bytes"] == int(memory) - CARD_RESERVE
    assert alone["devices"] == []
    assert [name for name in layers["devices"] if name != "cpu"] == ["cuda:2"]


def test_the_text_has_a_bar_for_each_device(folders: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert main(["plan", folders["bf16"], "--memory=64GiB", "--devices=12GiB,12GiB", "--tensor-parallel=2"]) == 0

    lines = capsys.readouterr().out.splitlines()
    bars = [line for line in lines if line.startswith("cuda:")]
    assert len(bars) == 2
    for line in bars:
        bar = re.search(r"\|(w+c+s*\.*)\|$", line)
        assert bar is not None
        assert len(bar[1]) == 40
    assert "on the cards, all that is named but for a reserve" in lines[1]


def test_a_gguf_file_on_two_cards_of_llama_cpp_has_a_line_for_each(capsys: pytest.CaptureFixture[str]):
    more = ("--gpu-layers=-1", "--memory=1GiB", "--max-model-len=4096", "--devices=2GiB,2GiB")
    _, even, _ = planned(capsys, str(bundled_model()), *more, "--tensor-split=1,1")
    _, uneven, _ = planned(capsys, str(bundled_model()), *more, "--tensor-split=3,1")
    _, rows, _ = planned(capsys, str(bundled_model()), *more, "--split-mode=row")
    _, none, _ = planned(capsys, str(bundled_model()), *more, "--split-mode=none")

    assert even["devices"] == ["CUDA0", "CUDA1"]
    assert even["device_layers"] == [16, 15]
    assert uneven["device_layers"] == [24, 7]
    assert sum(uneven["device_weight_bytes"]) == sum(even["device_weight_bytes"]) == even["weight_bytes"]
    assert rows["devices"] == ["CUDA0", "CUDA1"]
    assert none["devices"] == ["CUDA0"]


def test_a_gguf_file_in_the_torch_engine_is_planned_in_ranks_of_the_cpu(capsys: pytest.CaptureFixture[str]):
    more = ("--gguf-engine=own", "--device=cpu", "--memory=2GiB", "--max-model-len=2048")
    status, found, _ = planned(capsys, str(bundled_model()), *more, "--tensor-parallel=2")
    whole = planned(capsys, str(bundled_model()), *more)[1]

    assert status == 0
    assert found["devices"] == ["rank 0 on the CPU", "rank 1 on the CPU"]
    assert found["q8_bytes_per_token"] == whole["q8_bytes_per_token"]
    first, second = found["device_cache_bytes"]
    assert first == 2 * second  # SmolLM2 has three heads of keys: two and one


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--devices=nonsense"], "--devices: should be a size from 1MiB to 1024TiB, such as 24GiB, not 'nonsense'"),
        (["--devices=24GiB,"], "--devices: should be a size from 1MiB to 1024TiB, such as 24GiB, not ''"),
        (["--devices=" + ",".join(["1GiB"] * 17)], "--devices: at most 16 cards can be planned for, not 17"),
        (["--devices=1GiB", "--device-memory=1GiB"], "--devices and --device-memory mean the same; give only one"),
        (
            ["--devices=24GiB", "--tensor-parallel=2"],
            "--tensor-parallel 2 wants 2 devices, and there is 1 device: --devices 24GiB,24GiB",
        ),
        (["--devices=24GiB,24GiB", "--tensor-parallel=2", "--gpu-split=auto"], "give only one of the two"),
        (["--devices=24GiB", "--gpu-split=20,24"], "--gpu-split 20,24: GiB for each of 2 cards, and there is 1 card"),
        (["--devices=24GiB", "--gpu-split=lots"], "--gpu-split: should be auto, or GiB for each card"),
        (["--devices=24GiB", "--gpu-split=0,0"], "--gpu-split: should be auto, or GiB for each card"),
        (["--devices=24GiB", "--tensor-split=1,1"], "--tensor-split is of GGUF files; --gpu-split says how many GiB"),
        (
            ["--device=cpu", "--devices=24GiB"],
            "--device cpu and cards that --devices or --device-memory names contradict each other",
        ),
        (
            ["--device=cuda:2", "--devices=24GiB,24GiB"],
            "--device cuda:2: sizes of 2 cards are named, cuda:0 to cuda:1",
        ),
        (
            ["--device=cuda:1", "--devices=24GiB,24GiB", "--tensor-parallel=2"],
            "--tensor-parallel 2 takes cards from cuda:0 on, and --device cuda:1 is one card",
        ),
        (["--device=cpu", "--gpu-split=auto"], "--gpu-split lays layers out on cards, and there is none here"),
    ],
)
def test_whatever_is_wrong_with_devices_is_one_line(
    arguments: list[str], part: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    assert part in refused(capsys, folders["GPTQ"], "--memory=64GiB", *arguments)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--devices=2GiB,2GiB", "--gpu-layers=-1", "--tensor-parallel=2"], "--split-mode row shares each matrix"),
        (["--devices=2GiB,2GiB", "--gpu-split=1,1"], "a GGUF file's layers go to cards by --gpu-layers -1"),
        (["--devices=2GiB", "--gpu-layers=-1", "--tensor-split=1,1"], "and there is 1 card; give 1 at most"),
    ],
)
def test_options_for_folders_are_refused_for_a_gguf_file_with_the_one_that_is_meant(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
):
    assert part in refused(capsys, str(bundled_model()), "--memory=1GiB", *arguments)


def test_devices_that_do_not_hold_the_model_are_told_how_many_would(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    more = ("--memory=64GiB", "--max-model-len=4096")
    ranks = refused(capsys, folders["bf16"], *more, "--devices=4GiB,4GiB", "--tensor-parallel=2")
    layers = refused(
        capsys, folders["bf16"], "--memory=2GiB", "--max-model-len=4096", "--devices=4GiB,4GiB", "--gpu-split=auto"
    )

    assert re.search(r"cuda:0: .* GiB", ranks)
    count = re.search(r"; (\d) devices of 4GiB would do", ranks)
    assert count is not None
    devices = ",".join(["4GiB"] * int(count[1]))
    assert main(["plan", folders["bf16"], *more, f"--devices={devices}", f"--tensor-parallel={count[1]}"]) == 0
    capsys.readouterr()
    fewer = ",".join(["4GiB"] * (int(count[1]) - 1))
    refused(capsys, folders["bf16"], *more, f"--devices={fewer}", f"--tensor-parallel={int(count[1]) - 1}")

    assert re.search(
        r"need \d+\.\d\d GiB more than cuda:0 \(3\.69 GiB\) and cuda:1 \(3\.69 GiB\) have room for", layers
    )
    assert re.search(r"; 3 devices would do", layers)
