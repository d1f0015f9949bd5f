"""The planner's formulas for GGUF, held to what llama.cpp reserves for the same model and context."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ADAPTERS
from gguf_files import write_model
from gguf_models import gemma
from llama_buffers import allocated, listen
from recurrent_gguf import write_lfm2, write_mamba

from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.layout import FIXED_BYTES, KEPT_SLOTS, KEPT_STATE_BYTES, Layout, Memory
from tightrope.backends.gguf.native import ModelOptions, NativeContext, NativeModel
from tightrope.backends.gguf.plan import MAX_CHECKPOINTS, GGUFPlan, context_options, make_plan
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import ModelSettings

GIB = 1 << 30
Sizes = Counter[tuple[str, str]]
LOOSENESS = 3  # The bound may be so many times what is reserved, beside what is fixed.


def mixtral(folder: Path) -> Path:
    return write_model(ADAPTERS / "mixtral-bf16", folder / "mixtral.gguf")


def reserve(path: Path, settings: ModelSettings, caplog: pytest.LogCaptureFixture) -> tuple[GGUFPlan, Sizes]:
    """A plan, and what llama.cpp reserves for it when it is shown the header alone."""
    plan = make_plan(settings, read_header(path), Memory(64 * GIB))
    listen(caplog)
    native = NativeModel(path, ModelOptions(has_weights=False))
    NativeContext(native, context_options(settings, plan)).close()
    native.close()
    return plan, allocated(caplog)


@pytest.mark.parametrize("cells", [2048, 32_768])
@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize(("model", "dtype"), [("smollm2", "q8"), ("gemma", "f16"), ("mixtral", "f16")])
def test_a_plan_bounds_what_llama_cpp_reserves_and_not_by_much(
    model: str, dtype: str, tokens: int, cells: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = {"smollm2": bundled_model, "gemma": gemma, "mixtral": lambda: mixtral(tmp_path)}[model]()
    cache = {"dtype": dtype, "tokens": cells}
    settings = ModelSettings.model_validate({"max_model_len": cells, "step_tokens": tokens, "cache": cache})
    plan, found = reserve(path, settings, caplog)

    reserved = found["CPU", "compute"] + found["CPU", "output"]
    assert reserved > 0
    assert reserved <= plan.layout.workspace_bytes(plan.num_cells) <= LOOSENESS * reserved + FIXED_BYTES


@pytest.mark.parametrize("model", [bundled_model, gemma])
def test_weights_and_cache_take_what_was_planned(model: Callable[[], Path], caplog: pytest.LogCaptureFixture) -> None:
    settings = ModelSettings.model_validate({"max_model_len": 1024, "cache": {"dtype": "q8", "tokens": 1024}})
    plan = make_plan(settings, read_header(model()), Memory(64 * GIB))
    listen(caplog)
    GGUFBackend(model(), settings, lambda _: None).close()

    found = allocated(caplog)
    assert found["CPU", "model"] == pytest.approx(plan.layout.host_weight_bytes, rel=0.01)
    assert found["CPU", "KV"] == pytest.approx(1024 * plan.layout.token_bytes(plan.cache_type), rel=0.01)


def test_states_of_recurrent_layers_are_counted_for_every_sequence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_mamba(tmp_path / "mamba.gguf")
    plan = make_plan(ModelSettings(), read_header(path), Memory(64 * GIB))
    listen(caplog)
    GGUFBackend(path, ModelSettings(), lambda _: None).close()

    layout, found = plan.layout, allocated(caplog)
    states = sum(slot.state_bytes for slot in layout.slots)
    assert states == 2 * 4 * layout.max_seqs * (3 * 128 + 16 * 128)
    assert found["CPU", "RS"] == pytest.approx(states, rel=0.01)
    assert found["CPU", "compute"] + found["CPU", "output"] <= layout.workspace_bytes(plan.num_cells)
    assert layout.host_need(0, plan.cache_type) == layout.host_weight_bytes + layout.workspace_bytes(0) + states


@pytest.mark.parametrize("write", [write_mamba, write_lfm2])
def test_a_checkpoint_takes_no_more_than_was_planned(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path, settings = write(tmp_path / "model.gguf"), ModelSettings(max_model_len=512)
    plan = make_plan(settings, read_header(path), Memory(64 * GIB))
    backend = GGUFBackend(path, settings, lambda _: None)
    context = backend._context
    context.token_ids[:40] = 7
    context.positions[:40] = range(40)
    context.outputs[39] = 1
    context.decode(0, 40)
    assert MAX_CHECKPOINTS * context.state_bytes(0) <= plan.checkpoint_bytes
    backend.close()


def test_the_states_of_finished_sequences_are_bounded_together(tmp_path: Path) -> None:
    """A model whose state takes 120 MiB keeps four finished sequences, beside those that run."""

    def widen(key: str, value: int) -> int:
        return {"mamba.ssm.inner_size": 1 << 20, "mamba.ssm.state_size": 12}.get(key, value)

    header = read_header(write_mamba(tmp_path / "mamba.gguf"))
    wide = replace(header, metadata={key: widen(key, value) for key, value in header.metadata.items()})
    layout = Layout.of(ModelSettings(max_num_seqs=16), wide, Memory(64 * GIB))
    assert layout.shape.state_bytes == 2 * 4 * (1 << 20) * (3 + 12)
    assert layout.max_seqs == 16 + KEPT_STATE_BYTES // layout.shape.state_bytes == 16 + 4
    small = Layout.of(ModelSettings(max_num_seqs=16), header, Memory(64 * GIB))
    assert small.max_seqs == 16 + KEPT_SLOTS
