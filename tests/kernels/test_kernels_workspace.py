"""The memory that a kernel takes while it runs is what the plan counts, however long the context is."""

import pytest
import torch
from live_bytes import LiveBytes
from test_kernels_cpu import rope_table, step_of

from tightrope.kernels import reference
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, CacheFormat, LayerCache

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("spec", [AttentionSpec(0.1), AttentionSpec(0.1, window=100, softcap=30.0)])
@pytest.mark.parametrize(("rows", "length"), [(1, 20_000), (100, 4000), (100, 8000)])
@pytest.mark.parametrize("dtype", ["f16", "q8", "q4"])
def test_the_references_attention_keeps_within_the_bytes_that_are_planned_for_any_context(
    dtype: CacheDtype, rows: int, length: int, spec: AttentionSpec
):
    step = step_of([rows], [length])
    cache = LayerCache.allocate(CacheFormat(dtype, 2, 64), int(step.block_tables.max()) + 1)
    queries, table = torch.randn(rows, 8, 64), rope_table(32, step, num_sets=1)
    with LiveBytes() as live:
        reference.attention(queries, cache, step, table, spec)

    assert live.most - queries.nbytes <= reference.attention_bytes(rows, 8, 2, 64)
