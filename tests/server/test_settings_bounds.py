"""Every number among the settings has bounds, wherever it is written; one beyond them is named in one line."""

import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tightrope.backends.settings import ModelSettings
from tightrope.server.settings.options import OPTIONS
from tightrope.server.settings.settings import ServerSettings, SettingsError, env_name, load_settings

pytestmark = pytest.mark.quick


def kinds(annotation: object) -> Iterator[object]:
    """The plain types that an annotation is made of: dict[str, int | None] has str, int and NoneType."""
    inner = [part for part in typing.get_args(annotation) if isinstance(part, type) or typing.get_args(part)]
    if typing.get_origin(annotation) is typing.Literal:
        return
    if not inner:
        yield annotation
    for part in inner:
        yield from kinds(part)


def numbers(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """Places of all numbers in a tree of settings, each with int or float."""
    for name, info in model.model_fields.items():
        for kind in kinds(info.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, (*path, name))
            elif kind in (int, float):
                yield (*path, name), kind


NUMBERS = dict(numbers(ServerSettings))
OPTIONS_OF_NUMBERS = [name for name, option in OPTIONS.items() if option.path in NUMBERS]


def beyond(name: str) -> list[str]:
    """Texts of numbers that no setting may have: too small and too large, and for a float what is none."""
    option = OPTIONS[name]
    if option.is_reciprocal:
        return ["1e-30", "-1e-30", "1e30", "0", "inf", "nan"]
    whole = [str(-(10**30)), str(10**30), str(10**400), "9" * 5000, str(-(1 << 31)), str(1 << 31), str(1 << 63)]
    if option.path[-1] == "theta":
        whole = ["0", str(10**30)]  # RoPE bases are large
    return [*whole, "inf", "-inf", "nan"] if NUMBERS[option.path] is float else whole


def on_the_command_line(name: str, text: str, folder: Path) -> None:
    load_settings({name: text}, {})


def in_the_environment(name: str, text: str, folder: Path) -> None:
    load_settings({}, {env_name(name): text})


def in_the_file(name: str, text: str, folder: Path) -> None:
    (folder / "tightrope.toml").write_text(f"{name} = {text}\n")
    load_settings({"config": str(folder / "tightrope.toml")}, {})


SOURCES: list[Callable[[str, str, Path], None]] = [on_the_command_line, in_the_environment, in_the_file]


def test_the_walk_finds_numbers_at_every_depth():
    """Guards the tests below, which would pass if it found none."""
    assert {("port",), ("engine", "model", "threads"), ("engine", "model", "rope", "factor")} <= set(NUMBERS)
    assert {("engine", "model", "cache", "tokens"), ("engine", "limits", "busy_step_ms")} <= set(NUMBERS)
    assert {OPTIONS[name].path for name in OPTIONS_OF_NUMBERS} == set(NUMBERS)
    assert set(kinds(dict[str, tuple[int, ...] | None])) == {str, int, type(None)}


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("name", OPTIONS_OF_NUMBERS)
def test_a_number_beyond_its_bounds_is_refused_from_every_source(
    name: str, write: Callable[[str, str, Path], None], tmp_path: Path
):
    label = {on_the_command_line: f"--{name}", in_the_environment: env_name(name), in_the_file: name}[write]
    for text in beyond(name):
        with pytest.raises(SettingsError) as caught:
            write(name, text, tmp_path)

        assert "\n" not in str(caught.value)
        assert label in str(caught.value) or "not TOML" in str(caught.value)


@pytest.mark.parametrize("write", SOURCES)
def test_threads_are_at_most_four_for_each_cpu_that_may_be_used(
    write: Callable[[str, str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 7}, raising=False)

    write("threads", "12", tmp_path)
    for text in ("13", "100000"):
        with pytest.raises(SettingsError, match=f"at most 12 threads for the 3 CPUs that may be used, not {text}$"):
            write("threads", text, tmp_path)


def test_defaults_are_within_the_bounds_of_a_single_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)

    assert ServerSettings.model_validate(ServerSettings().model_dump()) == ServerSettings()
    assert ModelSettings(threads=4).threads == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpu-layers", "9999"),
        ("n-cpu-moe", "999"),
        ("max-model-len", "200000"),
        ("kv-cache-tokens", "2000000"),
        ("max-num-seqs", "128"),
        ("step-tokens", "8192"),
        ("rope-theta", "1e9"),
        ("max-body-bytes", "100000000"),
        ("busy-step-ms", "2000"),
        ("max-waiting", "10000"),
        ("max-stop-sequences", "64"),
    ],
)
def test_numbers_that_people_use_are_within_the_bounds(name: str, text: str):
    load_settings({name: text}, {})
