"""Which build of the C++ kernels runs, and what is said of one that can't."""

import _ctypes
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tightrope.kernels import dispatch
from tightrope.kernels.cpu import addresses, native, structs
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

pytestmark = pytest.mark.quick


@pytest.fixture
def dispatched_anew() -> Iterator[None]:
    """Whatever the test changes, kernels are looked for in it and after it."""
    for remembered in (dispatch._fastest, dispatch._native, dispatch._cpu):
        remembered.cache_clear()
    yield
    for remembered in (dispatch._fastest, dispatch._native, dispatch._cpu):
        remembered.cache_clear()


def reference_serves(caplog: pytest.LogCaptureFixture) -> str:
    """Whether the reference runs; the one line that says why."""
    for _ in range(2):
        assert dispatch.linear(torch.ones(1, 3), torch.ones(2, 3), None).tolist() == [[3, 3]]
    assert dispatch.describe() == "torch reference"
    (record,) = [record for record in caplog.records if "kernels=reference" in record.message]
    assert "\n" not in record.message
    assert record.message == f"kernels=reference: {dispatch.fault()}"
    assert dispatch.fault("cuda") is None
    return record.message


@pytest.mark.usefixtures("dispatched_anew")
def test_a_machine_without_a_build_runs_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(native, "usable", lambda: ())

    assert "the C++ kernels are not built; to mend it: make " in reference_serves(caplog)


@pytest.mark.usefixtures("dispatched_anew")
def test_a_build_of_another_version_is_left_alone_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(native, "INTERFACE", 10_000)

    line = reference_serves(caplog)

    assert f"{native.build_path('portable')} is of another version: its interface is " in line
    assert line.endswith(f", not 10000; to mend it: {native.remedy()}")


@pytest.mark.usefixtures("dispatched_anew")
@pytest.mark.parametrize(("name", "size"), [("Rope", "40"), ("Unheard", "-1")])
def test_a_build_whose_structs_have_another_size_is_left_alone_and_the_reference_serves(
    name: str, size: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    one_field = type(name, (ctypes.Structure,), {"_fields_": structs.Rope._fields_[:1]})
    monkeypatch.setattr(structs, "STRUCTS", (structs.Cache, one_field))

    line = reference_serves(caplog)

    assert f"{native.build_path('portable')} is of another version: its {name} has {size} bytes, not 8;" in line


def test_a_cache_is_described_once_and_as_long_as_it_lives():
    before = len(addresses._kept)
    cache = LayerCache.allocate(CacheFormat("q8", 2, 64), 1)

    assert addresses.address(cache) == addresses.address(cache)
    assert len(addresses._kept) == before + 1

    del cache
    assert len(addresses._kept) == before


@pytest.mark.usefixtures("dispatched_anew")
@pytest.mark.parametrize(
    ("is_library", "reason"), [(True, "is no build of these kernels"), (False, "can't be loaded: ")]
)
def test_a_file_that_is_no_build_of_ours_is_named_and_the_reference_serves(
    is_library: bool,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    foreign = tmp_path / "cpu_portable.so"
    foreign.write_bytes(Path(_ctypes.__file__).read_bytes() if is_library else b"no library")
    monkeypatch.setattr(native, "build_path", lambda instruction_set: foreign)

    line = reference_serves(caplog)

    assert f"{foreign} {reason}" in line
    assert line.endswith(f"; to mend it: {native.remedy()}")


def test_the_fastest_build_is_what_runs():
    assert dispatch.describe() == f"C++ ({native.usable()[0]})"
    assert dispatch.fault() is None


@pytest.mark.parametrize("compiler", ["/usr/bin/g++", None])
@pytest.mark.parametrize(
    ("python", "sources", "command"),
    [
        (".venv/bin/python", "build.mk", "make kernels in {home}"),
        ("other/bin/python", "build.mk", "make -f kernels/cpu/build.mk PYTHON={home}/other/bin/python in {home}"),
        (
            "bin/python",
            None,
            "pip install --force-reinstall --no-deps, and the folder that tightrope was installed from",
        ),
    ],
)
def test_what_mends_it_is_the_command_for_the_python_that_runs(
    python: str,
    sources: str | None,
    command: str,
    compiler: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (folder := tmp_path / "kernels" / "cpu").mkdir(parents=True)
    if sources is not None:
        (folder / sources).touch()
    monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / python))
    monkeypatch.setattr(native, "which", lambda name: compiler)

    more = "" if compiler or sources is None else ", once g++ is installed"
    assert native.remedy() == command.format(home=tmp_path) + more
