"""Safetensors files give exactly the tensors that they hold, or one line naming file and tensor."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import MAX_HEADER, Checkpoint, read_header

pytestmark = pytest.mark.quick

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]
Header = dict[str, Any]


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> Header:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, num_bytes: int) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(range(256)) * (num_bytes // 256 + 1))
    with path.open("r+b") as file:
        file.truncate(8 + len(raw) + num_bytes)
    return path


def sharded(folder: Path, **changes: str) -> Path:
    """A folder of two shards with an index, in which `changes` replace the file names of tensors."""
    save_file({"a": torch.arange(4.0), "b": torch.arange(6.0)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.arange(8.0)}, folder / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(folder, {"a": first, "b": first, "c": second} | changes)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_what_was_saved_is_read_back_to_the_last_bit(tmp_path: Path, data: st.DataObject):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5))
    tensors = {}
    for i, shape in enumerate(shapes):
        raw = torch.randint(0, 2, shape) if (dtype := data.draw(st.sampled_from(DTYPES))) is torch.bool else None
        tensors[f"layer.{i}"] = (torch.randn(shape) * 50 if raw is None else raw).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    checkpoint = Checkpoint.open(tmp_path)

    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_shards_come_in_order_with_their_tensors(tmp_path: Path):
    checkpoint = Checkpoint.open(sharded(tmp_path))

    assert [shard.path.name for shard in checkpoint.shards()] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [set(shard.names) for shard in checkpoint.shards()] == [{"a", "b"}, {"c"}]
    assert checkpoint.tensors["c"].shape == (8,)
    assert torch.equal(checkpoint.read("c"), torch.arange(8.0))


def test_a_misaligned_tensor_is_read_all_the_same(tmp_path: Path):
    header = {"odd": entry(0, 3, "U8", [3]), "f": entry(3, 11)}
    write(tmp_path / "model.safetensors", b"{" + b" " * 7 + json.dumps(header).encode()[1:], 11)

    found = Checkpoint.open(tmp_path).read("f")

    assert found.view(torch.uint8).tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert found.data_ptr() % 4 == 0


def test_reading_copies_nothing_and_writing_to_it_changes_no_file(tmp_path: Path):
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(tmp_path)

    first = checkpoint.read("w")
    assert checkpoint.read("w").data_ptr() == first.data_ptr()
    first.zero_()
    checkpoint.release(checkpoint.shards()[0])

    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(checkpoint.read("w"), torch.ones(1000))


def test_releasing_a_shard_gives_its_memory_back(tmp_path: Path):
    save_file({"w": torch.ones(4 << 20)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    held = checkpoint.read("w")
    assert held.sum() == 4 << 20

    before = resident_file_bytes()
    checkpoint.release(checkpoint.shards()[0])

    assert before - resident_file_bytes() > 15 << 20
    assert held.sum() == 4 << 20


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"RssFile:\s+(\d+) kB", status)
    return int(kib) << 10


def test_a_single_file_goes_before_an_index_beside_it(tmp_path: Path):
    sharded(tmp_path)
    save_file({"whole": torch.ones(2)}, tmp_path / "model.safetensors")

    assert Checkpoint.open(tmp_path).tensors.keys() == {"whole"}


def test_files_of_any_name_are_found_without_an_index(tmp_path: Path):
    for number, name in enumerate(["a", "b"], 1):
        save_file({name: torch.ones(2)}, tmp_path / f"output-{number:05d}-of-00002.safetensors")
    save_file({"lora": torch.ones(2)}, tmp_path / "adapter_model.safetensors")

    assert Checkpoint.open(tmp_path).tensors.keys() == {"a", "b"}


def test_an_index_that_was_copied_from_another_model_is_left_aside(tmp_path: Path):
    save_file({"w": torch.ones(2)}, tmp_path / "output.safetensors")
    write_index(tmp_path, {"other": "model-00001-of-00001.safetensors"})

    assert Checkpoint.open(tmp_path).tensors.keys() == {"w"}


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path):
    snapshot, blobs = tmp_path / "models--o--n/snapshots/0123", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(2)}, blobs / "abcdef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcdef")

    assert torch.equal(Checkpoint.open(snapshot).read("w"), torch.ones(2))


def test_links_to_other_folders_and_disks_are_followed(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    sharded(tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").glob("*.safetensors"):
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "model/model.safetensors.index.json").symlink_to("../elsewhere/model.safetensors.index.json")

    assert torch.equal(Checkpoint.open(tmp_path / "model").read("c"), torch.arange(8.0))


def test_a_link_that_leads_nowhere_says_so(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/0123")

    with pytest.raises(BackendError, match=r"model\.safetensors: a link to .*/blobs/0123, which is missing"):
        Checkpoint.open(tmp_path)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"rotary_emb.inv_freq": SECOND, "mtp.fc.weight": SECOND}, {"rotary_emb.inv_freq", "mtp.fc.weight"}),
        ({"c": FIRST}, set()),
        ({"mtp.fc.weight": "mtp.safetensors"}, {"mtp.fc.weight"}),
    ],
)
def test_what_an_index_has_wrong_does_not_keep_the_tensors_from_being_read(
    tmp_path: Path, change: dict[str, str], absent: set[str]
):
    checkpoint = Checkpoint.open(sharded(tmp_path, **change))

    assert checkpoint.tensors.keys() == {"a", "b", "c"}
    assert checkpoint.absent.keys() == absent
    assert torch.equal(checkpoint.read("c"), torch.arange(8.0))


@pytest.mark.parametrize("weight_map", [{"a": FIRST}, {"a": FIRST, "c": SECOND}])
def test_tensors_and_shards_that_an_index_leaves_out_are_read(tmp_path: Path, weight_map: dict[str, str]):
    write_index(sharded(tmp_path), weight_map)

    assert Checkpoint.open(tmp_path).tensors.keys() == {"a", "b", "c"}


def test_a_shard_of_another_name_than_the_index_has_it_is_found(tmp_path: Path):
    (sharded(tmp_path) / SECOND).rename(tmp_path / "second.safetensors")

    assert Checkpoint.open(tmp_path).tensors.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_of_a_tensor_in_two_shards_the_one_counts_that_the_index_names(tmp_path: Path, named: str):
    sharded(tmp_path, a=named)
    save_file({"a": torch.ones(4), "c": torch.arange(8.0)}, tmp_path / SECOND)

    checkpoint = Checkpoint.open(tmp_path)

    assert torch.equal(checkpoint.read("a"), torch.arange(4.0) if named == FIRST else torch.ones(4))
    assert sorted(name for shard in checkpoint.shards() for name in shard.names) == ["a", "b", "c"]


def test_a_tensor_of_a_shard_that_is_missing_is_said_to_be_in_it(tmp_path: Path):
    (sharded(tmp_path) / SECOND).unlink()

    line = str(Checkpoint.open(tmp_path).missing("c", "which the model needs"))

    assert line.startswith(f"{tmp_path}/model.safetensors.index.json: shard {SECOND} is missing, and tensor 'c', which")
    assert line.endswith("download or copy the model again")


def test_a_tensor_that_only_the_index_knows_is_said_to_be_missing_in_its_file(tmp_path: Path):
    line = str(Checkpoint.open(sharded(tmp_path, d=SECOND)).missing("d", "which the model needs"))

    assert line.startswith(f"{tmp_path}/{SECOND}: tensor 'd' is missing, which the model needs, and its index says")


def test_the_layout_of_mistral_beside_the_same_weights_is_left_aside(tmp_path: Path):
    save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")

    assert Checkpoint.open(sharded(tmp_path)).tensors.keys() == {"a", "b", "c"}


GOOD = {"a": entry(0, 16), "b": entry(16, 40)}
BAD_HEADERS: list[tuple[object, int, str]] = [
    (b"", 0, "it begins with zeros"),
    (b"not json", 40, "its header is not JSON"),
    (b"[" * 5000, 40, "its header is not JSON"),
    (b"\xff\xfe", 40, "its header is not JSON"),
    (["a"], 40, "its header is not an object"),
    (GOOD | {"b": entry(12, 40, shape=[7])}, 40, "tensor 'b' overlaps the one before it: data_offsets begin at 12"),
    (GOOD | {"b": entry(20, 40)}, 40, "tensor 'b' leaves a gap before it: data_offsets begin at 20, not 16"),
    (GOOD, 39, r"tensor 'b': truncated: it ends at byte \d+, the file has \d+; copy it again"),
    (GOOD, 44, "4 bytes at its end belong to no tensor"),
    (GOOD | {"b": entry(16, 40, "F128")}, 40, "tensor 'b': dtype 'F128' is not known; BOOL"),
    (GOOD | {"b": entry(16, 40, shape=[5])}, 40, r"tensor 'b': F32 of shape \[5\] takes 20 bytes, .* hold 24"),
    (GOOD | {"b": entry(16, 40, shape=[-6])}, 40, r"tensor 'b': shape \[-6\] is not a list"),
    (GOOD | {"b": entry(16, 40, shape=[1] * 9)}, 40, r"tensor 'b': shape \[1, 1, .* of at most 8 sizes"),
    (GOOD | {"b": entry(16, 40, shape=[2**40, 2**40])}, 40, r"tensor 'b': F32 of shape .* takes \d+ bytes"),
    (GOOD | {"b": entry(16, 40) | {"shape": 6}}, 40, "tensor 'b': shape 6 is not a list"),
    (GOOD | {"b": entry(16, 40) | {"shape": [6.0]}}, 40, r"tensor 'b': shape \[6\.0\] is not a list"),
    (GOOD | {"b": entry(16, 40) | {"data_offsets": [40, 16]}}, 40, r"data_offsets \[40, 16\] are not \[begin, end\]"),
    (GOOD | {"b": entry(16, 40) | {"data_offsets": [16]}}, 40, r"data_offsets \[16\] are not \[begin, end\]"),
    (GOOD | {"b": entry(16, 40) | {"extra": 1}}, 40, "tensor 'b': its entry must have dtype, shape and data_offsets"),
    (GOOD | {"b": 7}, 40, "tensor 'b': its entry must have"),
    (b'{"a": 1, "a": 2}', 40, "header names 'a' twice"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "num_bytes", "line"), BAD_HEADERS, ids=lambda value: str(value)[:50])
def test_a_wrong_header_is_one_line_naming_file_and_tensor(tmp_path: Path, header: object, num_bytes: int, line: str):
    write(tmp_path / "model.safetensors", header, num_bytes)

    with pytest.raises(BackendError, match=rf"model\.safetensors: .*{line}") as caught:
        Checkpoint.open(tmp_path)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "it is empty; copy or download it again"),
        (bytes(4096), "it begins with zeros, as downloads that were broken off do"),
        (b"<!DOCTYPE html>\n<html>", "it is a web page"),
        (b"Entry not found", "it is a text, perhaps of a failed download: b'Entry not found'"),
        (b"/annex/objects/SHA256E-s9--0a.safetensors\n", "it is a text, .*/annex/objects/SHA256E"),
        (b"GGUF\3\0\0\0", "it is a GGUF file; give it a name that ends in .gguf"),
        (b"PK\3\4\0\0\x08\x08" + bytes(16), "pickled PyTorch weights, which are never loaded"),
        (b"\x10\0\0", "truncated: 3 bytes"),
        (b"\x10\0\0\0\0\0\0\0{}", "truncated: its header needs 24 bytes, the file has 10"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "its header would have 100000001 bytes"),
        (b"\xff" * 64, "its header would have \\d+ bytes; download or copy it again"),
    ],
)
def test_a_file_cut_short_or_of_another_kind_is_one_line(tmp_path: Path, content: bytes, line: str):
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(BackendError, match=rf"model\.safetensors: .*{line}"):
        Checkpoint.open(tmp_path)


def without_last_and_index(folder: Path) -> None:
    sharded(folder)
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).unlink()


def with_an_index_alone(folder: Path) -> None:
    for file in sharded(folder).glob("*.safetensors"):
        file.unlink()


def with_twice_the_same(folder: Path) -> None:
    for name in ("x", "y"):
        save_file({"w": torch.ones(2)}, folder / f"{name}.safetensors")


def with_two_indices(folder: Path) -> None:
    (sharded(folder) / "model.safetensors.index.json").rename(folder / "a.safetensors.index.json")
    (folder / "b.safetensors.index.json").write_text("{}")


BAD_FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (without_last_and_index, "shard model-00002-of-00002.safetensors is missing"),
    (lambda f: sharded(f, c="../model-00002-of-00002.safetensors"), r"weight_map of .c. is .*, outside the folder"),
    (lambda f: sharded(f, c="/etc/model.safetensors"), r"weight_map of 'c' is '/etc/.*, outside the folder"),
    (lambda f: sharded(f, c="..\\model.safetensors"), "weight_map of 'c' is .*, outside the folder"),
    (lambda f: sharded(f, c="model.bin"), r"weight_map of 'c' is 'model\.bin'; it must be a \.safetensors file's name"),
    (lambda f: (sharded(f), write_index(f, {})), r"index\.json: weight_map is missing or empty"),
    (lambda f: (sharded(f), write_index(f, [1])), r"index\.json: weight_map is missing or empty"),
    (lambda f: (sharded(f), (f / "model.safetensors.index.json").write_text("{")), r"index\.json: not JSON"),
    (with_two_indices, "holds 2 index files"),
    (with_an_index_alone, "an index without any of the .safetensors files that it names; download or copy the model"),
    (with_twice_the_same, r"y\.safetensors: tensor 'w' is in x\.safetensors as well"),
    (lambda f: save_file({}, f / "model.safetensors"), "its safetensors files hold no tensors"),
    (lambda f: (f / "pytorch_model.bin").touch(), r"pytorch_model\.bin: pickled weights can run code .* safetensors$"),
    (lambda f: (f / "consolidated.00.pth").touch(), r"consolidated\.00\.pth: pickled weights can run code"),
    (lambda f: (f / "config.json").touch(), r"holds no \.safetensors file"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "line"), BAD_FOLDERS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_folder_that_is_not_whole_is_one_line(tmp_path: Path, make: Callable[[Path], object], line: str):
    make(tmp_path)

    with pytest.raises(BackendError, match=line) as caught:
        Checkpoint.open(tmp_path)

    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.plain
@given(st.integers(0, 150), st.integers(0, 255), st.integers(0, 60))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_damaged_header_is_read_or_refused_in_one_line(tmp_path: Path, at: int, byte: int, cut: int):
    path = write(tmp_path / "model.safetensors", GOOD, 40)
    raw = bytearray(path.read_bytes())
    raw[at] = byte
    path.write_bytes(raw[: len(raw) - cut])

    outcome = entries_or_line(path)

    if isinstance(outcome, str):
        assert outcome.startswith(f"{path}: ")
        assert "\n" not in outcome
    else:
        ends = [end for _, end in outcome]
        assert [begin for begin, _ in outcome[1:]] == ends[:-1]
        assert ends[-1:] in ([path.stat().st_size], [])


def entries_or_line(path: Path) -> list[tuple[int, int]] | str:
    try:
        return [(e.begin, e.end) for e in read_header(path)]
    except BackendError as error:
        return str(error)


@given(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(1, 3000), st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, dtype: torch.dtype, size: int, data: st.DataObject
):
    tensor = torch.randn(size).to(dtype)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check_finite("w", tensor)
    value = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    tensor[data.draw(st.integers(0, size - 1))] = value

    what = "NaN" if value != value else "an infinite value"
    with pytest.raises(BackendError, match=rf"model\.safetensors: tensor 'w' holds {what}; weights must be finite"):
        checkpoint.check_finite("w", tensor)


def test_tensors_without_floating_point_values_are_finite(tmp_path: Path):
    tensors = {"codes": torch.arange(4, dtype=torch.int32), "none": torch.empty(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)

    for name, tensor in tensors.items():
        checkpoint.check_finite(name, tensor)


def test_a_file_that_became_shorter_since_it_was_opened_is_one_line(tmp_path: Path):
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)

    with pytest.raises(BackendError, match=r"model\.safetensors: became shorter than its \d+ bytes"):
        checkpoint.read("w")


@pytest.mark.plain
def test_reading_headers_loads_no_tensor_library(tmp_path: Path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from pathlib import Path; from tightrope.backends.files.safetensors import Checkpoint\n"
        "print(len(Checkpoint.open(Path(sys.argv[1])).tensors), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["1", "False"]
