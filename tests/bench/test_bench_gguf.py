"""GGUF files that are made to be measured, and what the committed results say of each type."""

import json
from collections import Counter

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from bench import report
from bench.gguf_types import KINDS, MOST_RELATIVE, MOST_WORSE, quantizer
from bench.large_gguf import MISTRAL_7B, q4_k_m

pytestmark = pytest.mark.quick


def test_a_file_called_q4_k_m_has_more_bits_where_llama_cpp_has_them():
    layers = MISTRAL_7B.layers
    kinds = {name: Counter(q4_k_m(name, i, layers) for i in range(layers)) for name in ("ffn_down", "attn_v", "attn_q")}

    assert kinds == {
        "ffn_down": {"q6_k": 16, "q4_k": 16},
        "attn_v": {"q6_k": 16, "q4_k": 16},
        "attn_q": {"q4_k": 32},
    }
    assert (q4_k_m("output", 0, layers), q4_k_m("token_embd", 0, layers)) == ("q6_k", "q4_k")


def test_the_quantizer_is_that_of_ggml():
    values = np.random.default_rng(1).standard_normal((3, 64), np.float32)

    encoded, code = quantizer()("Q8_0", values)

    assert code == GGMLQuantizationType.Q8_0
    assert np.array_equal(encoded, quantize(values, code))


def test_the_committed_results_hold_types_to_their_bars():
    rows = {row["type"]: row for row in json.loads((report.RESULTS / "gguf_types.json").read_text())["results"]["rows"]}

    assert set(rows) <= set(KINDS)
    assert len(rows) >= 8
    for row in rows.values():
        assert row["is_exact"]
        assert row["small"]["own"]["relative_error"] <= MOST_RELATIVE
        assert row["small"]["own"]["mean_kl"] < row["small"]["llama.cpp"]["mean_kl"]
        if "smollm2" in row:
            assert row["smollm2"]["worse"] <= MOST_WORSE
