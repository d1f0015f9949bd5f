"""The quantizers of the tests: files as the formulas of the formats read them, and errors that are made up for."""

import json

import pytest
import torch
from error_bounds import UNIT
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import awq, exl2, gptq, nf4, reading, streams
from quantizers.rounding import Grid, importance_order, round_corrected
from torch import Tensor

pytestmark = pytest.mark.quick

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.sampled_from((2, 3, 4, 5, 6, 8))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_codes(seed: int, bits: int, *shape: int) -> Tensor:
    return torch.randint(1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def field(words: list[int], bits: int, index: int) -> int:
    """Value `index` of a stream, from one large number."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return number >> (bits * index) & ((1 << bits) - 1)


@given(SEEDS, WIDTHS, st.integers(1, 3), st.integers(1, 4))
def test_a_stream_has_each_value_at_its_place_and_comes_back(seed: int, bits: int, runs: int, columns: int):
    codes = drawn_codes(seed, bits, 32 * runs, columns)
    words = streams.pack(codes, bits)

    for n in range(columns):
        column = words[:, n].tolist()
        assert [field(column, bits, r) for r in range(len(codes))] == codes[:, n].tolist()
    assert torch.equal(streams.unpack(words, bits), codes)
    assert torch.equal(streams.unpack_along(streams.pack_along(codes.t(), bits), bits), codes.t())


@settings(max_examples=12)
@given(SEEDS, st.integers(1, 20))
def test_an_exl2_matrix_reads_as_its_formula_says(seed: int, runs: int):
    inputs, outputs = 32 * runs, 32
    weight, order = drawn(seed, inputs, outputs), drawn(seed + 1, inputs).argsort()
    groups = exl2.mixed("mlp.gate_proj", inputs)
    parts = exl2.matrix(weight, torch.eye(inputs), order, groups)

    starts = parts["q_groups"][1::2].tolist()
    read = reading.exl2(parts)
    stored_row = 0
    for g, (bits, rows) in enumerate(groups):
        sources = order[stored_row : stored_row + rows]
        for n in (0, 17, 31):
            column = parts["q_weight"][starts[g] : starts[g] + rows * bits // 32, n].tolist()
            scale_code, largest = field(parts["q_scale"][g].tolist(), 4, n), float(parts["q_scale_max"][g])
            step = ((scale_code + 1) / 16) ** 2 * largest
            for r in {0, rows - 1}:
                value = (field(column, bits, r) - 2 ** (bits - 1)) * step
                assert parts["q_invperm"][sources[r]] == stored_row + r
                assert float(read[sources[r], n]) == torch.tensor(value, dtype=torch.float32).item()
            # of the scales tried the best is no worse than the widest, which cuts off what its half precision does
            widest = (min(scale_code + exl2.TRIED, 16) / 16) ** 2 * largest
            off = (read[sources, n] - weight[sources, n]).double().square().mean().sqrt()
            assert off <= (0.5 + 2.0**-11 * 2 ** (bits - 1)) * widest
        stored_row += rows


@given(
    st.integers(1, 500), st.sampled_from(("self_attn.v_proj", "self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj"))
)
def test_mixed_widths_cover_all_inputs_in_whole_runs_and_never_grow(runs: int, name: str):
    groups = exl2.mixed(name, 32 * runs)

    assert sum(rows for _, rows in groups) == 32 * runs
    assert all(rows > 0 and rows % 32 == 0 for _, rows in groups)
    widths = [bits for bits, _ in groups]
    assert widths == sorted(widths, reverse=True)


@settings(max_examples=12)
@given(SEEDS, st.sampled_from((32, 128, 160, 320)))
def test_a_gptq_matrix_reads_as_its_formula_says(seed: int, inputs: int):
    weight, order = drawn(seed, inputs, 32), drawn(seed + 1, inputs).argsort()
    parts = gptq.matrix(weight, torch.eye(inputs), order)

    read = reading.gptq(parts)
    for place in (0, inputs // 2, inputs - 1):
        k = int(order[place])
        group = int(parts["g_idx"][k])
        assert group == place // 128
        for n in (0, 13, 31):
            zero = field(parts["qzeros"][group].tolist(), 4, n) + 1
            step = float(parts["scales"][group, n])
            value = (field(parts["qweight"][:, n].tolist(), 4, k) - zero) * step
            assert zero == 8
            assert float(read[k, n]) == torch.tensor(value, dtype=torch.float32).item()
            # the largest value is 15 halves of a step that is rounded to half precision, before that step is shrunk
            # and the value cut off at 7 steps
            assert abs(value - float(weight[k, n])) <= (7.5 * (1 + 2.0**-11) / min(gptq.SHRINKS) - 7) * step


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 3), st.integers(1, 4))
def test_an_awq_matrix_reads_as_its_formula_says(seed: int, groups: int, eights: int):
    weight = drawn(seed, 64 * groups, 8 * eights)
    parts = awq.tensors_of(*awq.rounded(weight))

    read = reading.awq_gemm(parts)
    for k in (0, 63, 64 * groups - 1):
        for n in range(8):
            nibble = (0, 4, 1, 5, 2, 6, 3, 7)[n]
            zero = field(parts["qzeros"][k // 64, :1].tolist(), 4, nibble)
            step = float(parts["scales"][k // 64, n])
            value = (field(parts["qweight"][k, :1].tolist(), 4, nibble) - zero) * step
            assert float(read[k, n]) == torch.tensor(value, dtype=torch.float32).item()
    # half a step from rounding, half a step more where the zero point was rounded, and what half precision makes of 15
    step = parts["scales"].float().repeat_interleave(64, 0)
    assert bool(((read - weight).abs() <= (1 + 15 * 2.0**-11 + 32 * UNIT) * step).all())


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 9), st.sampled_from((64, 128, 576)))
def test_an_nf4_matrix_reads_as_its_formula_says(seed: int, outputs: int, inputs: int):
    weight = drawn(seed, outputs, inputs)
    parts = reading.parts_of(nf4.tensors_of("p.weight", weight), "p")

    read = reading.nf4(parts).t()
    state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
    assert state["shape"] == [outputs, inputs]
    for n, k in ((0, 0), (outputs - 1, inputs - 1), (outputs // 2, inputs // 2 + 1)):
        i = n * inputs + k
        byte = int(parts["weight"][i // 2, 0])
        code = byte & 15 if i % 2 else byte >> 4
        block = i // 64
        nested = float(parts["nested_quant_map"][int(parts["absmax"][block])] * parts["nested_absmax"][block // 256])
        value = float(parts["quant_map"][code]) * (nested + state["nested_offset"])
        assert abs(float(read[n, k]) - value) <= 3 * UNIT * abs(value)  # a sum and a product
    # half the widest gap of the book, of a block's largest, which itself is off by half of one of 255 gaps of 2; and
    # the roundings of a quotient, of sums and products
    most_off = float(nf4.CODEBOOK.diff().max()) / 2 + 1 / 255 + 16 * UNIT
    assert float((read - weight).abs().max() / weight.abs().max()) <= most_off


@settings(max_examples=20)
@given(SEEDS, st.integers(2, 5))
def test_correction_leaves_outputs_nearer_than_rounding_alone(seed: int, runs: int):
    inputs = 32 * runs
    activations = drawn(seed, 4 * inputs, inputs) @ drawn(seed + 1, inputs, inputs)  # correlated, as real ones
    weight, hessian = drawn(seed + 2, inputs, 64), activations.t() @ activations
    step = Grid(3, torch.full((64,), 0.8), torch.full((64,), 4.0))
    order = importance_order(hessian)
    rounded = round_corrected(weight[order], hessian[order][:, order], [(3, inputs)], lambda rows, bits: step)

    def output_error(values: Tensor) -> float:
        return float((activations @ (values - weight)).norm())

    corrected = torch.empty_like(weight)
    corrected[order] = step.decode(rounded.codes.float())
    assert output_error(corrected) < output_error(step.decode(step.encode(weight)))
