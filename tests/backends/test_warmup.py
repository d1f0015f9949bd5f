"""The kernels that are compiled before a model is served: all that its steps launch, and each of them once."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import FORMATS
from hypothesis import given, settings
from hypothesis import strategies as st
from step_builder import step_of
from torch import Tensor

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.matrices import Matrix
from tightrope.backends.hf.run.warmup import Steps, gather
from tightrope.backends.hf.warm import META, meta_steps
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import ModelSettings, RopeSettings
from tightrope.kernels import dispatch
from tightrope.kernels.forms.columns import ColumnMatrix
from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

# One of each format, with act-order and without, symmetric or not, and a mixture.
TINY = (
    "llama-exl2-mixed-h6",
    "llama-gptq-4bit-32g-actorder",
    "llama-gptq-8bit-asym",
    "llama-awq-4bit-32g",
    "llama-untied-bnb-nf4",
    "mixtral-gptq-4bit-32g-actorder",
)
SETTINGS = ModelSettings(max_model_len=256, max_num_seqs=4)
TARGET = 86


@cache
def steps_of(name: str) -> Steps:
    return meta_steps(FORMATS / "tiny" / name, SETTINGS)


@cache
def warmed(name: str) -> Mapping[str, Any]:
    with dispatch.standing_in(TARGET):
        return gather(steps_of(name))


def launched(name: str, chunks: list[tuple[int, int]], rows: list[int], *, is_recorded: bool) -> set[str]:
    """What a step of (tokens cached before, tokens now) launches; a recording takes contexts for the longest."""
    steps = steps_of(name)
    step = step_of(chunks, steps.window // PAGE)
    if is_recorded:
        step = replace(step, max_context_len=steps.window)
    else:
        step = replace(step, lengths=tuple((now, before + now) for before, now in chunks))
    model = steps.model
    caches = [
        LayerCache.allocate(CacheFormat(steps.cache_dtype, layer.num_kv_heads, layer.head_dim), 64, META)
        for layer in model.layers
    ]
    tables = {key: rotary.table([1] * len(chunks)) for key, rotary in steps.rotary.items()}
    num_tokens = sum(now for _, now in chunks)
    with dispatch.standing_in(TARGET), dispatch.gathered() as launches:
        model.forward(
            caches,
            torch.zeros(num_tokens, dtype=torch.int64, device=META),
            step.to(META),
            tables,
            torch.zeros(len(rows), dtype=torch.int64, device=META),
        )
    return set(launches)


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=12)
@given(data=st.data())
def test_no_step_launches_a_kernel_that_was_not_warmed(name: str, data: st.DataObject):
    chunk = st.tuples(st.integers(0, 100), st.one_of(st.just(1), st.integers(1, 90)))
    chunks = data.draw(st.lists(chunk, min_size=1, max_size=4))
    num_tokens = sum(now for _, now in chunks)
    rows = data.draw(st.lists(st.integers(0, num_tokens - 1), unique=True, max_size=num_tokens))

    assert launched(name, chunks, sorted(rows), is_recorded=data.draw(st.booleans())) <= warmed(name).keys()


@pytest.mark.parametrize("num_rows", [1, 3, 30, 300])
def test_an_expert_alone_launches_nothing_that_was_not_warmed_for_adapters(num_rows: int, tmp_path: Path):
    folder = FORMATS / "tiny" / "mixtral-gptq-4bit-32g-actorder"
    steps = meta_steps(folder, SETTINGS.model_copy(update={"adapter_folder": str(tmp_path)}))
    with dispatch.standing_in(TARGET):
        warmed = gather(steps)
    with dispatch.standing_in(TARGET), dispatch.gathered() as launches, torch.inference_mode():
        for module in (module for module in steps.model.tree.modules() if isinstance(module, Experts)):
            x = torch.empty(num_rows, module.hidden, dtype=torch.float16, device=META)
            module.second(1, module.first(1, x, None), None)

    assert launches.keys() <= warmed.keys()
    assert launches


@pytest.mark.parametrize("name", TINY)
def test_nothing_is_warmed_for_the_numbers_of_a_launch(name: str):
    for text, kernel in warmed(name).items():
        launch = json.loads(text)
        numbers = {i for i, kind in enumerate(launch["signature"].values()) if kind in ("i32", "i64", "fp32")}
        known = {key[0]: value for key, value in zip(launch["constant_keys"], launch["constant_vals"], strict=True)}
        run_time = [i for i, parameter in enumerate(kernel.params) if not parameter.is_constexpr]

        assert not {key[0] for key in launch["attrs_keys"]} & numbers, kernel.__name__
        assert {known[i] for i in run_time if i in known} <= {None}, kernel.__name__


@pytest.mark.parametrize("name", ["llama-exl2-mixed-h6", "llama-untied-exl2-5bit-h8"])
def test_all_widths_of_an_exl2_model_are_read_by_one_kernel(name: str):
    kernels = [kernel.__name__ for kernel in warmed(name).values()]

    assert len({matrix.widths for matrix in matrices(steps_of(name).model)}) == 1
    assert kernels.count("vector_parts") == kernels.count("expand_columns") == 1
    assert kernels.count("batch_parts") == 3  # tiles of 8, 16 and 32 rows
    assert kernels.count("sum_parts") == 1


@contextmanager
def as_on_a_card() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "reads_columns", lambda device: True)
        yield


def loaded(folder: Path, device: str) -> LoadedModel:
    shape = read_config(folder)
    rope = resolve_rope(shape.raw, RopeSettings(), 0)
    with as_on_a_card():
        return build(draw(folder, shape, Checkpoint.open(folder), rope, device))


def matrices(model: LoadedModel) -> list[ColumnMatrix]:
    weights: list[Matrix] = []
    for module in model.tree.modules():
        if isinstance(module, Linear):
            weights.append(module.weight)
        elif isinstance(module, Experts):
            weights += [*module.gate_up, *module.down]
    return [matrix for weight in weights for matrix in getattr(weight, "matrices", ())]


def outline(value: object) -> object:
    """A value with shapes and dtypes in place of tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if is_dataclass(value):
        return [(field.name, outline(getattr(value, field.name))) for field in fields(value)]
    if isinstance(value, tuple):
        return list(map(outline, value))
    return value


@pytest.mark.parametrize("name", sorted(path.name for path in (FORMATS / "tiny").iterdir() if path.is_dir()))
def test_a_model_on_the_meta_device_has_the_forms_of_a_loaded_one(name: str):
    folder = FORMATS / "tiny" / name

    stand_in, real = loaded(folder, "meta"), loaded(folder, "cpu")

    found, wanted = matrices(stand_in), matrices(real)
    assert found
    assert list(map(outline, found)) == list(map(outline, wanted))
    assert all(matrix.words.is_meta for matrix in found)
    ours, theirs = ([m.bias for m in model.tree.modules() if isinstance(m, Linear)] for model in (stand_in, real))
    assert list(map(outline, ours)) == list(map(outline, theirs))


def test_adapters_are_warmed_where_requests_may_name_them(tmp_path: Path):
    name = "llama-gptq-4bit-32g-actorder"
    folder = FORMATS / "tiny" / name
    with dispatch.standing_in(TARGET):
        found = gather(meta_steps(folder, SETTINGS.model_copy(update={"adapter_folder": str(tmp_path)})))

    added = {kernel.__name__ for text, kernel in found.items() if text not in warmed(name)}
    assert added == {"_shrink", "_expand"}
