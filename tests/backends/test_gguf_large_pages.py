"""Memory that is asked for in large pages, as Linux tells of it in /proc/self/smaps."""

import mmap
import re
from pathlib import Path

from tightrope.backends.gguf.large_pages import want_large_pages
from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.locate import bundled_model

MIB = 1 << 20

HAS_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()  # Without them small ones stay.


def wanted() -> list[range]:
    """The addresses of this process for which large pages were asked for."""
    found = []
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        begin, end = (int(place, 16) for place in part.split()[0].split("-"))
        if re.search(r"(?m)^VmFlags:.* hg\b", part):
            found.append(range(begin, end))
    return found


def mapped(num_bytes: int) -> tuple[mmap.mmap, set[int]]:
    """Memory of this process alone, and the places that it adds to those that are mapped."""
    before = mapped_places()
    return mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), mapped_places() - before


def mapped_places() -> set[int]:
    """The addresses of this process in steps of a large page."""
    places: set[int] = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(place, 16) for place in line.split()[0].split("-"))
        places.update(range(-(-begin // (2 * MIB)) * 2 * MIB, end // (2 * MIB) * 2 * MIB, 2 * MIB))
    return places


def test_what_is_yet_to_be_written_is_wanted_in_large_pages() -> None:
    memory, places = mapped(64 * MIB)
    want_large_pages()
    assert len(places) >= 31
    assert all(any(place in one for one in wanted()) is HAS_LARGE_PAGES for place in places)
    memory.close()


def test_what_was_written_is_left_as_it_is() -> None:
    memory, places = mapped(64 * MIB)
    memory.write(b"x" * 64 * MIB)
    want_large_pages()
    assert not any(place in one for one in wanted() for place in places)
    memory.close()


def test_a_model_loads_into_large_pages() -> None:
    before = sum(map(len, wanted()))
    model = NativeModel(bundled_model(), ModelOptions())
    assert (sum(map(len, wanted())) - before > 0.9 * bundled_model().stat().st_size) is HAS_LARGE_PAGES
    model.close()
