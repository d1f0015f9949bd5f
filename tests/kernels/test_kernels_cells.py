"""Our attention over llama.cpp's cells, as a node of ggml's own graphs, against plain float64."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as ll
from numpy.typing import NDArray

from tightrope.backends.gguf.ggml import ADDRESS, Tensors
from tightrope.backends.gguf.own_attention import show_samples
from tightrope.kernels.cpu import native
from tightrope.kernels.cpu.cells import CellAttention
from tightrope.kernels.forms.cells import GgmlSamples

pytestmark = pytest.mark.quick

Floats = NDArray[np.float32]
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0)
MEMORY = 64 << 20
SOME = settings(max_examples=40)


@dataclass(frozen=True)
class Case:
    """Queries [T, H, D], keys [N, Hkv, D] and values [N, Hkv, E] of two types, and what is added to scores [T, N]."""

    queries: Floats
    keys: Floats
    values: Floats
    mask: Floats
    key_kind: Kind = Kind.F16
    value_kind: Kind = Kind.F16
    scale: float = 0.3
    softcap: float = 0.0
    sinks: Floats | None = None

    def stored(self) -> tuple[Floats, Floats]:
        return _as(self.keys, self.key_kind), _as(self.values, self.value_kind)


def _as(numbers: Floats, kind: Kind) -> Floats:
    """The numbers that a type keeps of these."""
    return np.asarray(dequantize(quantize(numbers, kind), kind), np.float32).reshape(numbers.shape)


def exactly(case: Case) -> NDArray[np.float64]:
    """[T, H, E] float64"""
    keys, values = (numbers.astype(np.float64) for numbers in case.stored())
    group = case.queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat(group, 1), values.repeat(group, 1)
    scores = np.einsum("thd,nhd->thn", case.queries.astype(np.float64), keys) * case.scale
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    scores += case.mask.astype(np.float64)[:, None]
    if case.sinks is not None:
        sinks = np.broadcast_to(case.sinks.astype(np.float64)[:, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, sinks], 2)
    weights = np.exp(scores - scores.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    return np.einsum("thn,nhe->the", weights[..., : len(keys)], values)


class Attender:
    """One build's, and ggml's threads to run it."""

    def __init__(self, instruction_set: str, *, has_windows: bool = False) -> None:
        self._attention = CellAttention(instruction_set)
        assert show_samples(self._attention, has_windows=has_windows)
        self.close = self._attention.close

    def attend(self, case: Case, threads: int = 2, *, is_taken: bool = True) -> Floats:
        """[T, H, E] of a graph of one node. is_taken: it has to become ours, or else has to stay ggml's."""
        library: Any = ll._lib
        num_tokens, num_heads, _ = case.queries.shape
        with Tensors(MEMORY, have_data=True) as tensors:
            sources = [
                put(tensors, case.queries.transpose(1, 0, 2), Kind.F32),
                put(tensors, case.keys.transpose(1, 0, 2), case.key_kind),
                put(tensors, case.values.transpose(1, 0, 2), case.value_kind),
                put(tensors, case.mask[None], Kind.F16),
            ]
            node = tensors.attention(sources, case.scale, 0.0, case.softcap)
            if case.sinks is not None:
                sinks = put(tensors, case.sinks[None, None], Kind.F32)
                library.ggml_flash_attn_ext_add_sinks(ctypes.c_void_p(node), ctypes.c_void_p(sinks))
            new_graph = ctypes.CFUNCTYPE(ADDRESS, ADDRESS)(("ggml_new_graph", library))
            graph = ctypes.c_void_p(new_graph(tensors._context))
            library.ggml_build_forward_expand(graph, ctypes.c_void_p(node))
            take = ctypes.CFUNCTYPE(ctypes.c_bool, ADDRESS, ctypes.c_bool, ADDRESS)(self._attention.callback)
            operation = ctypes.CFUNCTYPE(ctypes.c_char_p, ADDRESS)(("ggml_op_desc", library))
            for _ in range(2):  # A graph that is kept is shown again.
                assert not take(node, True, self._attention.attender)
                assert operation(node) == (b"CUSTOM" if is_taken else b"FLASH_ATTN_EXT")
                library.ggml_graph_compute_with_ctx(ctypes.c_void_p(tensors._context), graph, threads)
            out = np.empty((num_tokens, num_heads, case.values.shape[2]), np.float32)
            ctypes.memmove(out.ctypes.data, tensors.data(node), out.nbytes)
        return out


def put(tensors: Tensors, numbers: Floats, kind: Kind) -> int:
    """[a, b, c] as a tensor whose innermost dimension is c."""
    raw = quantize(np.ascontiguousarray(numbers, np.float32), kind)
    tensor = tensors.new(int(kind), *reversed(numbers.shape))
    ctypes.memmove(tensors.data(tensor), np.ascontiguousarray(raw).ctypes.data, raw.nbytes)
    return tensor


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def attender(instruction_set: str) -> Iterator[Attender]:
    made = Attender(instruction_set)
    yield made
    made.close()


def causal(lengths: list[int], num_new: int, seed: int, *, window: int = 0, shared: int = 0) -> Floats:
    """[T, N] of sequences of so many tokens, whose cells are mixed; the last `num_new` of each are the step's.

    shared: cells in front that all begin with.
    """
    random = np.random.default_rng(seed)
    owner = np.concatenate([np.full(length, i) for i, length in enumerate(lengths)])
    random.shuffle(owner)
    spare = -np.ones(7, owner.dtype)
    owner = np.concatenate([spare, np.full(shared, -2), owner, spare])
    rows = []
    for i, length in enumerate(lengths):
        cells = np.flatnonzero((owner == i) | (owner == -2))
        for place in range(shared + max(0, length - num_new), shared + length):
            row = np.full(len(owner), -np.inf, np.float32)
            row[cells[max(0, place + 1 - window) if window else 0 : place + 1]] = 0
            rows.append(row)
    return np.stack(rows)


def random_case(seed: int, mask: Floats, kv_heads: int, group: int, dims: int, value_dims: int) -> Case:
    random = np.random.default_rng(seed)
    tokens, cells = mask.shape
    queries = random.standard_normal((tokens, kv_heads * group, dims), np.float32)
    keys = random.standard_normal((cells, kv_heads, dims), np.float32)
    return Case(queries, keys, random.standard_normal((cells, kv_heads, value_dims), np.float32), mask)


@SOME
@given(st.data())
def test_a_step_is_attention_in_float64(instruction_set: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    if data.draw(st.booleans()):
        lengths.append(data.draw(st.integers(1000, 2500)))  # Several parts, which threads share.
    window = data.draw(st.sampled_from((0, 0, 40)))
    shared = data.draw(st.sampled_from((0, 0, 300, 1100)))
    mask = causal(lengths, data.draw(st.sampled_from((1, 3, 20, 70))), seed, window=window, shared=shared)
    if data.draw(st.booleans()):
        mask += np.float16(np.random.default_rng(seed).standard_normal(mask.shape)).astype(np.float32)
    kv_heads, group = data.draw(st.sampled_from(((1, 1), (3, 3), (2, 8), (1, 20), (1, 32))))
    case = random_case(seed, mask, kv_heads, group, *data.draw(st.sampled_from(((64, 64), (96, 32), (128, 128)))))
    case = replace(
        case,
        key_kind=data.draw(st.sampled_from(KINDS)),
        value_kind=data.draw(st.sampled_from(KINDS)),
        softcap=data.draw(st.sampled_from((0.0, 5.0))),
        sinks=data.draw(st.sampled_from((None, np.linspace(-2, 6, kv_heads * group, dtype=np.float32)))),
    )
    attender = Attender(instruction_set, has_windows=bool(window))
    out = attender.attend(case, data.draw(st.integers(1, 3)))
    attender.close()
    np.testing.assert_allclose(out, exactly(case), atol=3e-5)


def test_a_token_gets_the_same_bits_in_any_step(attender: Attender) -> None:
    whole = random_case(1, causal([2300], 300, 1), 2, 3, 64, 64)
    wanted = attender.attend(whole, 1)
    for threads in (1, 2, 3):
        for first, last in ((0, 300), (299, 300), (290, 299), (13, 113)):
            part = replace(whole, queries=whole.queries[first:last], mask=whole.mask[first:last])
            assert (attender.attend(part, threads) == wanted[first:last]).all()


def test_a_token_gets_the_same_bits_whoever_has_cells_in_between(attender: Attender) -> None:
    alone = random_case(2, causal([1500], 5, 1), 2, 3, 64, 64)
    crowd = causal([1500, 900, 30], 5, 2)
    own = np.flatnonzero(np.isfinite(crowd[4]))
    random = np.random.default_rng(3)
    keys = random.standard_normal((crowd.shape[1], 2, 64), np.float32)
    values = random.standard_normal((crowd.shape[1], 2, 64), np.float32)
    held = np.flatnonzero(np.isfinite(alone.mask[4]))
    keys[own], values[own] = alone.keys[held], alone.values[held]
    queries = np.concatenate([alone.queries, random.standard_normal((10, 6, 64), np.float32)])
    beside = attender.attend(Case(queries, keys, values, crowd))
    assert (beside[:5] == attender.attend(alone)).all()


@pytest.mark.parametrize("shared", [0, 300, 1500])
@pytest.mark.parametrize("num_new", [1, 3])
def test_sequences_get_the_same_bits_in_company(attender: Attender, shared: int, num_new: int) -> None:
    mask = causal([70, 20, 66, 5, 700], num_new, 1, shared=shared)
    together = random_case(7, mask, 2, 3, 64, 64)
    out = attender.attend(together)
    for i in range(len(mask)):
        own = np.flatnonzero(np.isfinite(mask[i]))
        alone = replace(
            together, queries=together.queries[i : i + 1], keys=together.keys[own], values=together.values[own],
            mask=mask[i : i + 1, own],
        )  # fmt: skip
        assert (attender.attend(alone)[0] == out[i]).all()


def test_windows_are_cut_at_fixed_cells(instruction_set: str) -> None:
    attender = Attender(instruction_set, has_windows=True)
    whole = random_case(4, causal([1700], 600, 1, window=512), 1, 4, 64, 64)
    wanted = attender.attend(whole)
    for first, last in ((100, 300), (550, 600), (599, 600)):
        part = replace(whole, queries=whole.queries[first:last], mask=whole.mask[first:last])
        assert (attender.attend(part) == wanted[first:last]).all()
    attender.close()


def test_a_token_that_sees_nothing_gets_nothing(attender: Attender) -> None:
    mask = causal([90], 4, 1)
    mask[2] = -np.inf
    out = attender.attend(random_case(5, mask, 2, 2, 64, 64))
    assert np.isfinite(out).all()
    assert (out[2] == 0).all()


@pytest.mark.parametrize("kind", [Kind.Q5_1, Kind.Q4_1])
def test_other_types_stay_ggmls(attender: Attender, kind: Kind) -> None:
    case = replace(random_case(6, causal([90], 4, 1), 2, 2, 64, 64), key_kind=kind, value_kind=kind)
    np.testing.assert_allclose(attender.attend(case, is_taken=False), exactly(case), atol=0.05)


@pytest.mark.parametrize("field", GgmlSamples.__dataclass_fields__)
def test_a_ggml_of_another_layout_is_not_recognized(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str, field: str
) -> None:
    """One of its tensors, or of their parts, is elsewhere."""
    recognize = CellAttention.recognize

    def elsewhere(self: CellAttention, samples: GgmlSamples, *, has_windows: bool) -> bool:
        assert recognize(self, samples, has_windows=has_windows)
        self.close()
        found = getattr(samples, field)
        other = samples.custom if field == "attention" else samples.attention
        return recognize(
            self,
            replace(samples, **{field: other if isinstance(found, int) else [found[1], *found[1:]]}),
            has_windows=has_windows,
        )

    monkeypatch.setattr(CellAttention, "recognize", elsewhere)
    assert not show_samples(CellAttention(instruction_set), has_windows=False)
