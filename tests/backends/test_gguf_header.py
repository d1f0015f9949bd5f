"""The GGUF header reader refuses what llama.cpp would choke on, in one line that names the file and the reason."""

import ctypes
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import LongArray, read_header
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.locate import bundled_model

pytestmark = pytest.mark.quick

U32, STRING, ARRAY = 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    num_keys: int | None = None,
    num_tensors: int | None = None,
    data: bytes = b"\0" * 4096,
) -> bytes:
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def refusal(folder: Path, content: bytes) -> str:
    """The error line for a file of this content; fails unless there is exactly one line, and it names the file."""
    path = folder / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(BackendError) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


ALIGNMENT = "general.alignment"
F32, F64 = 6, 12
TOKENS, TYPES, KIND = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.model"


def floats(*values: float) -> bytes:
    return struct.pack(f"<IQ{len(values)}f", F32, len(values), *values)


def texts(*values: bytes) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(struct.pack("<Q", len(value)) + value for value in values)


def vocabulary(kind: str, *pieces: bytes, types: bytes | None = None, more: tuple[bytes, ...] = ()) -> bytes:
    keys = (key(KIND, STRING, text(kind)), key(TOKENS, ARRAY, texts(*pieces)), *more)
    return gguf(keys=keys if types is None else (*keys, key(TYPES, ARRAY, types)))


BYTES = tuple(b"<0x%02X>" % i for i in range(256))
BERT_IDS = tuple(
    key(f"tokenizer.ggml.{name}_token_id", U32, struct.pack("<I", i))
    for i, name in enumerate(("unknown", "cls", "seperator"))
)
HOSTILE = {
    "an empty file": (b"", "not a GGUF file: it is empty"),
    "another magic": (gguf(magic=b"GGML"), "not a GGUF file: it starts with b'GGML"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a git-lfs pointer"),
    "an old ggml file": (gguf(magic=b"lmgg"), "from before GGUF (ggml)"),
    "an old ggmf file": (gguf(magic=b"fmgg"), "from before GGUF (ggmf)"),
    "an old ggjt file": (gguf(magic=b"tjgg"), "convert_llama_ggml_to_gguf.py"),
    "an old adapter": (gguf(magic=b"algg"), "a LoRA adapter in llama.cpp's format from before GGUF"),
    "a file for big-endian machines": (gguf(magic=b"FUGG"), "big-endian"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "pickled PyTorch weights"),
    "a broken download": (bytes(5000), "begins with zeros"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "a text": (b"Entry not found", "it is a text"),
    "safetensors": (
        struct.pack("<Q", 40) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4),
        "safetensors",
    ),
    "43 bytes": (gguf(keys=(key("a", U32, struct.pack("<I", 1)),), num_keys=2)[:43], "truncated"),
    "version 0": (gguf(version=0), "big-endian"),
    "version 1": (gguf(version=1), "version 1 is not known"),
    "version 2^32-1": (gguf(version=2**32 - 1), "is not known"),
    "a big-endian file": (gguf(version=3 << 24), "big-endian"),
    "2^63 keys": (gguf(num_keys=2**63), "metadata keys"),
    "2^63 tensors": (gguf(num_tensors=2**63), "tensors"),
    "a key's name of 2^63 bytes": (gguf(keys=(struct.pack("<Q", 2**63),)), "string of"),
    "an empty key": (gguf(keys=(key("", U32, b"\0" * 4),)), "empty"),
    "a key twice": (gguf(keys=(key("a", U32, b"\0" * 4),) * 2), "second 'a'"),
    "a string of 2^63 bytes": (gguf(keys=(key("a", STRING, struct.pack("<Q", 2**63)),)), "string of"),
    "a value of type 255": (gguf(keys=(key("a", 255, b""),)), "type id 255"),
    "an array of arrays": (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "array of arrays"),
    "2^62 numbers": (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", U32, 2**62)),)), "truncated"),
    "2^62 strings": (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", STRING, 2**62)),)), "strings"),
    "an array of type 255": (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", 255, 1)),)), "type id 255"),
    "alignment 0": (gguf(keys=(key(ALIGNMENT, U32, struct.pack("<I", 0)),)), "power of two"),
    "alignment 3": (gguf(keys=(key(ALIGNMENT, U32, struct.pack("<I", 3)),)), "power of two"),
    "alignment 2^31": (gguf(keys=(key(ALIGNMENT, U32, struct.pack("<I", 2**31)),)), "power of two"),
    "alignment as text": (gguf(keys=(key(ALIGNMENT, STRING, text("32")),)), "power of two"),
    "alignment as u64": (gguf(keys=(key(ALIGNMENT, 10, struct.pack("<Q", 32)),)), "uint32"),
    "a tensor of 2^31 dimensions": (gguf(tensors=(text("t") + struct.pack("<I", 2**31),)), "dimensions"),
    "a dimension of 0": (gguf(tensors=(tensor("t", (0,)),)), "dimensions (0,)"),
    "dimensions that overflow": (gguf(tensors=(tensor("t", (2**32, 2**32, 2**32)),)), "needs"),
    "a dimension of 2^63": (gguf(tensors=(tensor("t", (2**63,)),)), "dimensions"),
    "a row that splits a block": (gguf(tensors=(tensor("t", (33,), kind=2),)), "multiple of 32"),
    "a tensor of type 255": (gguf(tensors=(tensor("t", (32,), kind=255),)), "type id 255"),
    "a removed tensor type": (gguf(tensors=(tensor("t", (32,), kind=4),)), "type id 4"),
    "a name of 2^63 bytes": (gguf(tensors=(struct.pack("<Q", 2**63),)), "name of"),
    "a tensor twice": (gguf(tensors=(tensor("t", (8,)), tensor("t", (8,), offset=32))), "second 't'"),
    "an unaligned offset": (gguf(tensors=(tensor("a", (8,)), tensor("b", (8,), offset=33))), "offset 33"),
    "overlapping tensors": (gguf(tensors=(tensor("a", (64,)), tensor("b", (8,), offset=32))), "offset 32"),
    "an offset behind the file": (gguf(tensors=(tensor("t", (8,), offset=2**62),)), "offset"),
    "a float of NaN": (gguf(keys=(key("a.scale", F32, struct.pack("<f", float("nan"))),)), "'a.scale' is nan"),
    "a float of infinity": (gguf(keys=(key("a.scale", F32, struct.pack("<f", float("-inf"))),)), "'a.scale' is -inf"),
    "a double of NaN": (gguf(keys=(key("a.scale", F64, struct.pack("<d", float("nan"))),)), "'a.scale' is nan"),
    "NaN in an array": (gguf(keys=(key("a", ARRAY, floats(0, 1, float("nan"))),)), "'a' has nan as number 2"),
    "infinity in a long array": (
        gguf(keys=(key("a", ARRAY, floats(*[0.5] * 5000, float("inf"))),)),
        "inf as number 5000",
    ),
    "a text twice": (vocabulary("gpt2", b"a", b"b", b"", b"", b"b"), "tokens 1 and 4 have the same text, 'b'"),
    "a text up to a zero": (vocabulary("gpt2", b"ab", b"c", b"ab\0c"), "tokens 0 and 2 have the same text, 'ab'"),
    "a text that is not UTF-8": (
        vocabulary("gpt2", b"a", b"\xc3", b"\xa9"),
        "the text of token 1, b'\\xc3', is not UTF-8",
    ),
    "texts that are numbers": (gguf(keys=(key(TOKENS, ARRAY, floats(1, 2)),)), f"{TOKENS} must be an array of strings"),
    "one text alone": (gguf(keys=(key(TOKENS, STRING, text("a")),)), f"{TOKENS} must be an array of strings"),
    "types that are floats": (vocabulary("gpt2", b"a", types=floats(1)), f"{TYPES} must be an array of int32"),
    "too few types": (
        vocabulary("gpt2", b"a", b"b", types=struct.pack("<IQi", 5, 1, 1)),
        f"{TYPES} has 1 elements; it must have one for each of 2 tokens",
    ),
    "a byte that no piece stands for": (vocabulary("llama", *BYTES[:200], *BYTES[201:]), "<0xC8> first"),
    "bert without its keys": (vocabulary("bert", b"a", b"b"), "tokenizer.ggml.unknown_token_id is missing"),
    "bert with an id beyond the end": (vocabulary("bert", b"a", b"b", more=BERT_IDS), "seperator_token_id is 2"),
    "bert with byte pieces": (
        vocabulary("bert", b"a", b"b", b"c", types=struct.pack("<IQ3i", 5, 3, 1, 6, 1), more=BERT_IDS),
        "has byte tokens",
    ),
    "a tensor cut short": (gguf(tensors=(tensor("t", (1024,)),), data=b"\0" * 4000), "truncated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    assert reason in refusal(tmp_path, content)


def test_a_well_formed_file_yields_its_metadata_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    keys = (
        key("s", STRING, text("Grüße")),
        key("list", ARRAY, struct.pack("<IQ2I", U32, 2, 7, 8)),
        key("long", ARRAY, struct.pack("<IQ", 0, 5000) + b"\1" * 5000),
    )
    path.write_bytes(gguf(keys=keys, tensors=(tensor("a", (8, 2)), tensor("b", (32,), kind=2, offset=64))))
    header = read_header(path)
    assert header.metadata == {"s": "Grüße", "list": (7, 8), "long": LongArray(5000)}
    assert [(t.name, t.dims, t.type_name, t.num_bytes) for t in header.tensors] == [
        ("a", (8, 2), "F32", 64),
        ("b", (32,), "Q4_0", 18),
    ]
    assert header.bits_per_weight == pytest.approx(8 * (64 + 18) / (16 + 32))


def test_a_vocabulary_that_can_be_served_is_taken_and_what_is_odd_about_it_noted(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    end = key("tokenizer.ggml.eos_token_id", U32, struct.pack("<I", 0))
    blank = "▁".encode()
    for content, note in (
        (vocabulary("llama", *BYTES, blank, more=(end,)), None),
        (vocabulary("llama", *BYTES, more=(end,)), "no piece for a blank"),
        (vocabulary("llama", *BYTES, blank), "names no end token"),
        (vocabulary("gpt2", b"a", more=(end,)), "lacks tokenizer.ggml.pre"),
        (vocabulary("gpt2", b"a", b"", b"", more=(end, key("tokenizer.ggml.pre", STRING, text("qwen2")))), None),
        (vocabulary("bert", b"a", b"b", b"c", more=(end, *BERT_IDS)), None),
    ):
        path.write_bytes(content)
        notes = read_header(path).notes
        assert (notes == ()) if note is None else (note in " ".join(notes)), notes


@pytest.mark.plain
def test_the_real_file_cut_anywhere_is_refused_at_once(tmp_path: Path) -> None:
    size = bundled_model().stat().st_size
    with bundled_model().open("rb") as real:
        head = real.read(4 << 20)  # holds all of the header, which is 1.8 MB
    cuts = [len(head) * i // 16 for i in range(16)] + [size * i // 16 for i in range(16)] + [size - 1]
    path = tmp_path / "cut.gguf"
    path.write_bytes(head)
    for cut in sorted(cuts, reverse=True):
        with path.open("r+b") as file:
            file.truncate(cut)  # beyond `head` the file is a hole: nothing of the tensors is read
        with pytest.raises(BackendError, match=r"cut\.gguf: (truncated|not a GGUF file)"):
            read_header(path)


@pytest.mark.plain
@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_file_with_changed_bytes_is_read_or_refused_and_nothing_else(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(
        gguf(
            keys=(
                key("general.architecture", STRING, text("llama")),
                key("list", ARRAY, struct.pack("<IQ", STRING, 2) + text("ab") + text("c")),
                key(ALIGNMENT, U32, struct.pack("<I", 32)),
            ),
            tensors=(tensor("a", (8, 2)), tensor("b", (32,), kind=2, offset=64)),
        )
    )
    places = st.tuples(st.integers(0, 300), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] = value
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BackendError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right, and each has something to hold
    else:
        assert header.weight_bytes <= len(content)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(BackendError, match=r"no such file|can't be read"):
            read_header(path)


def split_part(number: int, count: int) -> bytes:
    keys = (key("split.count", U32, struct.pack("<I", count)), key("split.no", U32, struct.pack("<I", number)))
    return gguf(keys=keys, tensors=(tensor(f"t{number}", (8,)),))


def test_the_parts_of_a_split_model_are_read_together(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"m-{number + 1:05d}-of-00003.gguf").write_bytes(split_part(number, 3))
    header = read_header(tmp_path / "m-00001-of-00003.gguf")
    assert [t.name for t in header.tensors] == ["t0", "t1", "t2"]
    with pytest.raises(BackendError, match="name its first part, m-00001-of-00003"):
        read_header(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(BackendError, match=r"m-00003-of-00003\.gguf is missing"):
        read_header(tmp_path / "m-00001-of-00003.gguf")


def test_block_sizes_are_those_of_ggml() -> None:
    ggml = ctypes.CDLL(str(Path(ll.__file__).parent / "lib" / "libggml-base.so"))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for kind, form in TENSOR_TYPES.items():
        assert (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) == (form.values, form.num_bytes), form.name


def test_sizes_of_the_real_model_come_from_its_header() -> None:
    shape = ModelShape.of(read_header(bundled_model()))
    assert (shape.architecture, shape.trained_len, shape.vocab_size) == ("llama", 8192, 49152)
    assert (shape.kv_heads, shape.num_heads, shape.key_dim, shape.value_dim) == ((3,) * 30, 9, 64, 64)
    assert shape.cache_bytes(ll.GGML_TYPE_F16, ll.GGML_TYPE_Q8_0) == 30 * 3 * 64 * (2 + 34 / 32)
    assert (shape.rope_base, shape.rope_dims) == (100000.0, 64)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ((), "general.architecture"),
        ((key("general.architecture", STRING, text("llama")),), "llama.block_count is None"),
        (
            (
                key("general.architecture", STRING, text("llama")),
                key("llama.block_count", U32, struct.pack("<I", 10**9)),
            ),
            "llama.block_count is 1000000000",
        ),
    ],
)
def test_a_file_without_sensible_sizes_is_refused(keys: tuple[bytes, ...], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(gguf(keys=keys))
    with pytest.raises(BackendError, match=reason):
        ModelShape.of(read_header(path))
