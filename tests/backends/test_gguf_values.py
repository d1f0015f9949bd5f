"""NaN and infinity in a GGUF file's tensors are refused, whatever type holds them, with file, tensor and field."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkout import ADAPTERS
from gguf_files import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import DataFile, Header, TensorInfo, read_header
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES, Floats, TensorType
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.values import ValueScan, check_values
from tightrope.backends.settings import ModelSettings

# the bits of values that aren't finite, as bytes, by the form that holds them
NOT_FINITE: dict[str, tuple[bytes, ...]] = {
    "f16": (b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\xff\xff"),
    "bf16": (b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\xff\xff"),
    "f32": tuple(struct.pack("<f", value) for value in (np.inf, -np.inf, np.nan)),
    "f64": tuple(struct.pack("<d", value) for value in (np.inf, -np.inf, np.nan)),
    "e8m0": (b"\xff",),
    "ue4m3": (b"\x7f", b"\xff"),
    "nibbles": (b"\x00\x00\x00\x00\x00\xc0\x00\x70",),
}
WITH_FLOATS = [kind for kind in TENSOR_TYPES.values() if kind.floats]
FIELDS = [(kind, floats) for kind in WITH_FLOATS for floats in kind.floats]


def write(path: Path, kind: TensorType, content: bytes, *, before: int = 0) -> Header:
    """A file of `before` bytes of another tensor, all zero, and then one of this type."""
    path.write_bytes(bytes(64 + before) + content)
    other = TensorInfo("other", (before // 4,), "F32", 0, before)
    num_values = len(content) // kind.num_bytes * kind.values
    tensor = TensorInfo("blk.0.attn_q.weight", (num_values,), kind.name, before, len(content))
    return Header(path, {}, (DataFile(path, 64, (other, tensor)),))


@pytest.mark.parametrize(("kind", "floats"), FIELDS, ids=[f"{kind.name}-{floats.field}" for kind, floats in FIELDS])
def test_each_float_of_each_type_is_refused_when_it_is_not_finite(
    kind: TensorType, floats: Floats, tmp_path: Path
) -> None:
    num_blocks = 200_000 // kind.num_bytes * 3  # more than is read at once
    for bits in NOT_FINITE[floats.form]:
        for block in (0, 1, num_blocks // 2, num_blocks - 1):
            content = bytearray(num_blocks * kind.num_bytes)
            start = block * kind.num_bytes + floats.start
            content[start : start + len(bits)] = bits
            header = write(tmp_path / "m.gguf", kind, bytes(content), before=4096)
            where = f"field {floats.field} of block {block}" if floats.field else f"value {block}"
            with pytest.raises(BackendError) as caught:
                check_values(header)
            line = str(caught.value)
            assert line.startswith(
                f"{tmp_path / 'm.gguf'}: tensor 'blk.0.attn_q.weight' holds NaN or infinity: {where} ("
            )
            assert "\n" not in line


class _Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h, as far as it is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def unpacker(type_id: int) -> Callable[[np.ndarray], np.ndarray]:
    """ggml's own conversion of blocks, uint8, to float32."""
    library = ctypes.CDLL(str(Path(ll.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    traits = library.ggml_get_type_traits(type_id).contents
    kind = TENSOR_TYPES[type_id]

    def unpack(blocks: np.ndarray) -> np.ndarray:
        values = np.zeros(blocks.size // kind.num_bytes * kind.values, np.float32)
        traits.to_float(blocks.ctypes.data, values.ctypes.data, len(values))
        return values

    return unpack


# types that ggml converts; F32, F64, Q8_1 and Q8_K hold plain floats or are never stored, and ggml reads an NVFP4 scale
# of NaN as 0
CONVERTED = [
    i for i, kind in TENSOR_TYPES.items() if kind.floats and kind.name not in ("F32", "F64", "Q8_1", "Q8_K", "NVFP4")
]


@pytest.mark.parametrize("type_id", CONVERTED, ids=[TENSOR_TYPES[i].name for i in CONVERTED])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_random_blocks_are_refused_exactly_if_ggml_makes_values_of_them_that_are_not_finite(
    type_id: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = TENSOR_TYPES[type_id]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, 20 * kind.num_bytes, np.uint8)
    if kind.name == "MXFP4":  # beside its NaN, exponents from 254 on times 6 are beyond float32
        blocks[:: kind.num_bytes] = np.where(rng.random(20) < 0.02, 255, rng.integers(0, 253, 20))
    values = unpacker(type_id)(blocks)
    header = write(tmp_path_factory.mktemp("random") / "m.gguf", kind, blocks.tobytes())
    try:
        check_values(header)
        is_refused = False
    except BackendError:
        is_refused = True
    assert is_refused == (not np.isfinite(values).all())


def test_whole_numbers_are_not_taken_for_floats(tmp_path: Path) -> None:
    for kind in TENSOR_TYPES.values():
        if not kind.floats:
            check_values(write(tmp_path / "m.gguf", kind, b"\xff" * 64))


def test_the_later_parts_of_a_split_model_are_looked_at(tmp_path: Path) -> None:
    f32 = TENSOR_TYPES[0]
    good = write(tmp_path / "1.gguf", f32, bytes(64))
    bad = write(tmp_path / "2.gguf", f32, struct.pack("<4f", 0, 0, np.nan, 0))
    with pytest.raises(BackendError, match=r"2\.gguf: tensor 'blk\.0\.attn_q\.weight' holds NaN or infinity: value 2"):
        check_values(Header(tmp_path / "1.gguf", {}, good.files + bad.files))


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    header = write(tmp_path / "m.gguf", TENSOR_TYPES[0], bytes(64))
    with header.path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BackendError, match=r"became shorter while it was read, in tensor 'blk\.0\.attn_q\.weight'"):
        check_values(header)


def test_a_scan_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a hole that would take minutes
    tensor = TensorInfo("t", (1 << 37,), "F32", 0, 1 << 39)
    with ValueScan(Header(path, {}, (DataFile(path, 0, (tensor,)),))) as scan:
        pass
    scan.finish()


def test_a_model_with_a_damaged_scale_or_value_is_not_served(tmp_path: Path) -> None:
    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf")
    header = read_header(path)
    good = path.read_bytes()
    for tensor in (header.tensors[0], header.tensors[-1]):
        start = header.files[0].data_start + tensor.offset + tensor.num_bytes - 4
        path.write_bytes(good[:start] + struct.pack("<f", np.nan) + good[start + 4 :])
        with pytest.raises(BackendError, match=f"tensor '{tensor.name}' holds NaN or infinity: value"):
            GGUFBackend(path, ModelSettings(step_tokens=16), lambda _: None)
    path.write_bytes(good)
    GGUFBackend(path, ModelSettings(step_tokens=16), lambda _: None).close()
