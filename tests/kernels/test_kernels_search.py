"""Words of a file with all bits of a mask set are found, by every build and by the reference, wherever they are."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES, TensorType
from tightrope.backends.gguf.values import _masks
from tightrope.kernels import dispatch
from tightrope.kernels.cpu import native
from tightrope.kernels.dispatch import search_file
from tightrope.kernels.forms.masks import ROOM

BUILDS = [*native.usable(), "reference"]
WITH_FLOATS = [kind for kind in TENSOR_TYPES.values() if kind.floats]


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    built = None if name == "reference" else native.NativeSearch(name)
    monkeypatch.setattr(dispatch, "_search", lambda: built)
    return name


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("kind", WITH_FLOATS, ids=[kind.name for kind in WITH_FLOATS])
def test_the_first_of_some_words_is_found_wherever_it_is(kind: TensorType, tmp_path: Path) -> None:
    masks = _masks(kind)
    dtype, words_of_block = masks.block.dtype, len(masks.block)
    lowest_bit = masks.all_set & -masks.all_set  # cleared in all words but those to be found
    looked_at = np.flatnonzero(masks.block)
    path = tmp_path / "words"
    buffer = np.empty(ROOM, np.uint8)

    @given(
        num_blocks=st.integers(1, 3 * ROOM // kind.num_bytes),
        seed=st.integers(0, 2**32 - 1),
        places=st.lists(st.floats(0, 1, exclude_max=True), max_size=3),
        before=st.integers(0, 100),
    )
    @settings(max_examples=15, deadline=None)
    def check(num_blocks: int, seed: int, places: list[float], before: int) -> None:
        rng = np.random.default_rng(seed)
        words = rng.integers(0, np.iinfo(dtype).max, num_blocks * words_of_block, dtype, endpoint=True)
        blocks = words.reshape(num_blocks, words_of_block)
        blocks[:, looked_at] &= np.array(np.iinfo(dtype).max ^ lowest_bit, dtype)
        specialised = []
        for place in places:
            number = int(place * num_blocks * len(looked_at))
            block, word = number // len(looked_at), int(looked_at[number % len(looked_at)])
            blocks[block, word] |= masks.all_set
            specialised.append((block * words_of_block + word) * dtype.itemsize)
        path.write_bytes(bytes(before) + words.tobytes() + b"\xff" * 64)
        with path.open("rb") as file:
            found = search_file(file.fileno(), before, words.nbytes, masks, buffer)
        assert found == (min(specialised) if specialised else None)

    check()


@pytest.mark.usefixtures("build")
def test_a_part_beyond_the_end_and_a_file_that_cannot_be_read_raise(tmp_path: Path) -> None:
    masks = _masks(TENSOR_TYPES[0])
    buffer = np.empty(ROOM, np.uint8)
    path = tmp_path / "words"
    path.write_bytes(bytes(100))
    with path.open("rb") as file, pytest.raises(EOFError):
        search_file(file.fileno(), 0, 104, masks, buffer)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            search_file(folder, 0, 4, masks, buffer)
    finally:
        os.close(folder)
