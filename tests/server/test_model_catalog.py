"""Which models there are: of a folder by its files' names, of a list by its tables."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tightrope.server.models.catalog import Catalog, read_catalog
from tightrope.server.models.folder import MAX_ENTRIES
from tightrope.server.settings.settings import ServerSettings, SettingsError, load_settings

pytestmark = pytest.mark.quick


def catalog(place: Path, **options: str) -> Catalog:
    return read_catalog(load_settings({"models": str(place), **options}, {}))


def paths(found: Catalog) -> dict[str, str | None]:
    return {name: settings.engine.model.model for name, settings in found.settings.items()}


def files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(path: Path, tables: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(tables))
    return path


def test_files_and_folders_are_models_and_all_else_is_passed_over(tmp_path: Path) -> None:
    files(
        tmp_path, "small.gguf", "split-00001-of-00002.gguf", "split-00002-of-00002.gguf", "mmproj-small.gguf", "READ.md"
    )
    files(tmp_path, ".hidden.gguf", "story/config.json", "story/model.safetensors", "one/Q4.gguf", "one/mmproj.gguf")
    files(tmp_path, "several/Q4.gguf", "several/Q8.gguf", "adapter/adapter_model.safetensors", ".cache/x.gguf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.gguf").mkdir()
    assert paths(catalog(tmp_path)) == {
        "one": str(tmp_path / "one"),
        "several/Q4": str(tmp_path / "several/Q4.gguf"),
        "several/Q8": str(tmp_path / "several/Q8.gguf"),
        "small": str(tmp_path / "small.gguf"),
        "split": str(tmp_path / "split-00001-of-00002.gguf"),
        "story": str(tmp_path / "story"),
    }


def test_a_file_that_is_called_as_a_folder_keeps_its_ending(tmp_path: Path) -> None:
    files(tmp_path, "a.gguf", "a/model.safetensors", "b.gguf", "b-00001-of-00002.gguf")
    assert list(catalog(tmp_path).settings) == ["a", "a.gguf", "b", "b.gguf"]


def test_models_of_publishers_are_found_two_folders_deep(tmp_path: Path) -> None:
    files(tmp_path, "bartowski/smol-GGUF/smol-Q4.gguf", "bartowski/smol-GGUF/mmproj-smol.gguf", "bartowski/loose.gguf")
    files(tmp_path, "unsloth/large/large-00001-of-00002.gguf", "unsloth/large/large-00002-of-00002.gguf")
    files(tmp_path, "unsloth/pair/Q4.gguf", "unsloth/pair/Q8.gguf", "unsloth/pair/deeper/Q2.gguf", "unsloth/notes.md")
    files(tmp_path, "org/story/config.json", "org/story/model.safetensors", "org/story/1_Dense/model.safetensors")
    (tmp_path / "unsloth" / "again").symlink_to("..")
    assert paths(catalog(tmp_path)) == {
        "bartowski": str(tmp_path / "bartowski"),
        "bartowski/smol-GGUF": str(tmp_path / "bartowski/smol-GGUF"),
        "org/story": str(tmp_path / "org/story"),
        "unsloth/large": str(tmp_path / "unsloth/large"),
        "unsloth/pair/Q4": str(tmp_path / "unsloth/pair/Q4.gguf"),
        "unsloth/pair/Q8": str(tmp_path / "unsloth/pair/Q8.gguf"),
    }


def test_what_leads_out_of_the_folder_is_left_out_with_a_line(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "models"
    files(outside, "secret.gguf", "story/model.safetensors")
    files(folder, "a.gguf")
    (folder / "link.gguf").symlink_to(outside / "secret.gguf")
    (folder / "story").symlink_to(outside / "story")
    (folder / "up").symlink_to("..")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    (folder / "inside.gguf").symlink_to("a.gguf")
    (folder / "one").mkdir()
    (folder / "one" / "link.gguf").symlink_to(outside / "secret.gguf")
    found = catalog(folder)
    assert list(found.settings) == ["a", "inside"]
    assert [note.split("'")[1] for note in found.notes] == ["link.gguf", "one/link.gguf", "story", "up"]
    assert all("out of the folder" in note for note in found.notes)


def test_names_that_requests_cannot_use_are_left_out_with_a_line(tmp_path: Path) -> None:
    files(tmp_path, "a.gguf", "new\nline.gguf", " blank.gguf", "x" * 202 + ".gguf", os.fsdecode(b"\xff.gguf"))
    found = catalog(tmp_path)
    assert list(found.settings) == ["a"]
    assert len(found.notes) == 4
    assert all(note.isprintable() for note in found.notes)


def test_pipes_and_devices_are_no_models(tmp_path: Path) -> None:
    files(tmp_path, "a.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "null.gguf").symlink_to("/dev/null")
    assert list(catalog(tmp_path).settings) == ["a"]


def test_a_folder_of_ten_thousand_models_is_read_and_of_too_many_refused(tmp_path: Path) -> None:
    for number in range(10_000):
        (tmp_path / f"m{number:05}.gguf").touch()
    found = catalog(tmp_path)
    assert len(found.settings) == 10_000
    assert found.settings["m04321"].engine.model.model == str(tmp_path / "m04321.gguf")
    for number in range(10_000, MAX_ENTRIES + 1):
        (tmp_path / f"m{number:05}.gguf").touch()
    with pytest.raises(SettingsError, match=f"has more than {MAX_ENTRIES} entries"):
        catalog(tmp_path)


def test_a_list_has_settings_for_each_that_win_over_the_general_ones(tmp_path: Path) -> None:
    files(tmp_path, "small.gguf")
    path = tmp_path / "models.toml"
    path.write_text(
        '[small]\nmodel = "small.gguf"\nmax-model-len = 4096\n'
        '[story]\nmodel = "/srv/story"\nkv_cache = "q4"\nrope-factor = 2\nlora = { limarp = "/srv/limarp" }\n'
        '["org/name"]\nchat-template = "chatml"\n'
    )
    found = catalog(path, **{"kv-cache": "f16", "max-num-seqs": "3", "port": "9000"}).settings
    assert list(found) == ["small", "story", "org/name"]
    small, story, hub = (settings.engine.model for settings in found.values())
    assert (small.model, small.max_model_len, small.cache.dtype) == (str(tmp_path / "small.gguf"), 4096, "f16")
    assert (story.model, story.cache.dtype, story.rope.kind, story.rope.factor) == ("/srv/story", "q4", "linear", 2)
    assert story.adapters == {"limarp": "/srv/limarp"}
    assert (hub.model, found["org/name"].chat_template) == ("org/name", "chatml")
    assert {settings.engine.model.max_num_seqs for settings in found.values()} == {3}
    assert {settings.port for settings in found.values()} == {9000}


def test_paths_in_a_list_count_from_its_folder(tmp_path: Path) -> None:
    files(tmp_path, "small.gguf", "loras/limarp.gguf")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    own = {"model": "small.gguf", "chat-template": "chat.jinja", "lora": {"limarp": "loras/limarp.gguf", "other": "no"}}
    settings = catalog(listed(tmp_path / "models.json", {"a": own})).settings["a"]
    assert settings.engine.model.model == str(tmp_path / "small.gguf")
    assert settings.engine.model.adapters == {"limarp": str(tmp_path / "loras/limarp.gguf"), "other": "no"}
    assert settings.chat_template == "{{ messages }}"


def test_what_a_list_implies_gives_way_to_what_was_said_in_general(tmp_path: Path) -> None:
    path = listed(tmp_path / "models.json", {"a": {"rope-factor": 4}})
    found = catalog(path, **{"rope-scaling": "yarn"}).settings
    assert (found["a"].engine.model.rope.kind, found["a"].engine.model.rope.factor) == ("yarn", 4)


def test_the_model_on_the_command_line_is_the_first(tmp_path: Path) -> None:
    files(tmp_path, "a.gguf", "b.gguf")
    assert list(catalog(tmp_path, model="b").settings) == ["b", "a"]
    with pytest.raises(SettingsError, match=r"MODEL: beside --models it is the name of one of them, not 'c'"):
        catalog(tmp_path, model="c")


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"a": {"port": 1}}, "a: port: this is a setting of the server"),
        ({"a": {"served-model-name": "b"}}, "a: served-model-name: this is a setting of the server"),
        ({"a": {"models": "/"}}, "a: models: this is a setting of the server"),
        ({"a": {"max-model-length": 1}}, "a: max-model-length: no such setting"),
        ({"a": {"max-model-len": -1}}, "a: max-model-len: input should be greater than or equal to 0, not -1"),
        ({"a": {"max-model-len": "many"}}, "a: max-model-len: input should be a valid integer"),
        ({"a": {"model": 3}}, "a: model: input should be a valid string, not 3"),
        ({"a": {"alpha-value": 2, "compress-pos-emb": 2}}, "contradict each other"),
        ({"a": []}, "a: should be a table of options"),
        ({"": {}}, "'' can't name a model"),
        ({"a\0": {}}, "can't name a model"),
        ({"a" * 201: {}}, "can't name a model"),
        ({"a": {"lora": {"b": "/x"}}, "b": {}}, "lora: 'b' is the name of another model or adapter"),
        ({"a": {"lora": {"c": "/x"}}, "b": {"lora": {"c": "/y"}}}, "b: lora: 'c' is the name of another"),
        ({}, "holds no model"),
    ],
)
def test_a_list_with_a_mistake_is_refused_in_one_line(tmp_path: Path, tables: Mapping[str, Any], line: str) -> None:
    path = listed(tmp_path / "models.json", tables)
    with pytest.raises(SettingsError) as refused:
        catalog(path)
    assert line in str(refused.value)
    assert str(path) in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("name", "raw", "line"),
    [
        ("models.toml", b"[a", "not TOML"),
        ("models.json", b"{", "not JSON"),
        ("models.json", b'{"a": {}, "a": {}}', "'a' is there twice"),
        ("models.json", b"[]", "should be an object"),
        ("models.json", b"[" * 100_000, "not JSON"),
        ("models.toml", b"\xff", "not UTF-8 text"),
        ("models.toml", b"#" * (5 << 20), "more than 4194304 bytes"),
    ],
)
def test_a_file_that_is_no_list_is_refused_in_one_line(tmp_path: Path, name: str, raw: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(SettingsError) as refused:
        catalog(tmp_path / name)
    assert line in str(refused.value)


@pytest.mark.parametrize("name", ["absent", "absent.toml", "a\0b", "x" * 5000, "~nobody-here"])
def test_a_place_that_is_not_there_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="--models"):
        read_catalog(ServerSettings(models=name if name.startswith("~") else f"{tmp_path}/{name}"))


def test_an_empty_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no model: neither a"):
        catalog(tmp_path)


@pytest.mark.parametrize(("option", "value"), [("served-model-name", "x"), ("lora", "a=/b")])
def test_what_can_be_said_of_one_model_alone_is_refused_beside_several(tmp_path: Path, option: str, value: str) -> None:
    files(tmp_path, "a.gguf")
    with pytest.raises(SettingsError, match=f"--{option}: "):
        catalog(tmp_path, **{option: value})
