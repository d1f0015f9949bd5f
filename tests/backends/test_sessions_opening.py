"""What a store is opened with: the model's identity, and whether its disk is of any use."""

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeBackend

from tightrope.backends.sessions import identity, opening
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.identity import files_identity
from tightrope.backends.sessions.opening import open_store
from tightrope.backends.sessions.rates import compute_seconds, read_seconds
from tightrope.backends.settings import CacheSettings

pytestmark = pytest.mark.quick


@pytest.fixture
def model(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    return files


def test_a_model_is_known_by_what_is_in_its_files(model: list[Path], tmp_path: Path) -> None:
    folder = Folder(tmp_path / "chats")
    before = files_identity(model, folder)
    moved = [file.rename(file.with_suffix(".moved")) for file in model]
    assert files_identity(moved, folder) == before
    assert files_identity(moved[::-1], folder) != before
    changed = bytearray(moved[1].read_bytes())
    changed[500] ^= 1
    moved[1].write_bytes(changed)
    assert files_identity(moved, folder) != before


def test_a_model_that_stays_as_it_is_is_read_once(
    model: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_identity(model, Folder(tmp_path / "chats"))
    monkeypatch.setattr(identity, "_hash", lambda path: pytest.fail(f"{path} was read"))
    assert files_identity(model, Folder(tmp_path / "chats")) == before


def test_what_the_folder_remembers_is_forgotten_where_it_makes_no_sense(model: list[Path], tmp_path: Path) -> None:
    before = files_identity(model, Folder(tmp_path / "chats"))
    (tmp_path / "chats" / "tightrope-hashes").write_bytes(b'{"torn')
    assert files_identity(model, Folder(tmp_path / "chats")) == before


@pytest.mark.parametrize(("disk_s", "is_used"), [(1e-12, True), (1.0, False), (0.0, True)])
def test_a_disk_is_used_where_it_is_faster_than_the_model(
    disk_s: float, is_used: bool, model: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "read_seconds", lambda folder: disk_s)
    monkeypatch.setattr(opening, "compute_seconds", lambda backend: 1e-3)
    settings = CacheSettings(session_dir=str(tmp_path / "chats"))
    backend = FakeBackend()
    backend.card = replace(backend.card, cache_token_bytes=1000.0)
    store, (note,) = open_store(settings, 1 << 20, backend, model, [])
    assert store.outlives is is_used
    assert f"chats are {'' if is_used else 'not '}kept in {tmp_path / 'chats'}" in note
    assert ("can't be measured, as nothing can be written there" in note) is (disk_s == 0)
    store.close()


def test_disk_and_model_are_measured_without_a_trace(tmp_path: Path) -> None:
    folder, backend = Folder(tmp_path / "chats"), FakeBackend()
    assert read_seconds(folder) > 0
    assert compute_seconds(backend) > 0
    assert not [*folder.scan()]
    assert backend.kv.usage().used == 0
