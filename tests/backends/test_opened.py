"""A model's files are opened only if they are files: anything else is one line, and none of it is waited for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import read_header as read_gguf
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.json import read_object
from tightrope.backends.files.opened import read_bytes
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.text.sentencepiece import read_sentencepiece
from tightrope.backends.hf.text.tokenizer import HFTokenizer

pytestmark = pytest.mark.quick

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


def read_weights(path: Path) -> object:
    return Checkpoint.open(path.parent)


def read_index(path: Path) -> object:
    (path.parent / "model-00001-of-00001.safetensors").touch()
    return Checkpoint.open(path.parent)


def read_tokenizer(path: Path) -> object:
    sizes = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    (path.parent / "config.json").write_text(str(sizes).replace("'", '"'))
    return HFTokenizer(path.parent, read_config(path.parent))


READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("config.json", lambda path: read_config(path.parent)),
    ("model.safetensors", read_weights),
    ("model-00002-of-00002.safetensors", read_weights),
    ("model.safetensors.index.json", read_index),
    ("tokenizer.json", read_tokenizer),
    ("tokenizer.model", read_sentencepiece),
    ("model-Q8_0.gguf", read_gguf),
]


@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_a_git_lfs_pointer_in_place_of_a_file_is_called_one(tmp_path: Path, name: str, read: Callable[[Path], object]):
    if "00002" in name:
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(POINTER)
        name = "model-00001-of-00002.safetensors"
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    (tmp_path / name).write_bytes(POINTER)

    with pytest.raises(BackendError, match="a git-lfs pointer in place of the file itself: fetch that with") as caught:
        read(tmp_path / name)

    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("../blobs/0123")


def a_circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_pipe, "can't be read: no ordinary file but a pipe, a device or a folder"),
        (endless, "can't be read: no ordinary file but a pipe, a device or a folder"),
        (a_folder, "can't be read: (a folder, where a file is expected|no ordinary file)"),
        (dangling, r"a link to .*/blobs/0123, which is missing; bring that back, or download the file again"),
        (a_circle, "can't be read: Too many levels of symbolic links"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b" " * 65), "65 bytes are too many; at most 64 are expected"),
    ],
)
def test_what_is_no_file_is_one_line_and_is_not_waited_for(tmp_path: Path, make: Callable[[Path], object], reason: str):
    make(tmp_path / "config.json")

    with pytest.raises(BackendError, match=rf"config\.json: {reason}") as caught:
        read_object(tmp_path / "config.json", 64)

    assert "\n" not in str(caught.value)


def test_links_are_followed_and_no_more_is_read_than_allowed(tmp_path: Path):
    (tmp_path / "there").write_bytes(b"x" * 64)
    (tmp_path / "here").symlink_to("there")

    assert read_bytes(tmp_path / "here", 64) == b"x" * 64
