"""The planner's formulas for GGUF, held to what llama.cpp reserves for the same model and context."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkout import ADAPTERS
from gguf import GGUFWriter, TokenType
from gguf_files import write_model
from gguf_models import gemma
from llama_buffers import allocated, listen

from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.layout import FIXED_BYTES, Memory
from tightrope.backends.gguf.native import ModelOptions, NativeContext, NativeModel
from tightrope.backends.gguf.plan import GGUFPlan, context_options, make_plan
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


MAMBA = {"embedding_length": 64, "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16}


def mamba(path: Path) -> Path:
    """A Mamba of two layers, of zeros: it keeps a state for each sequence, and no keys and values."""
    writer = GGUFWriter(path, "mamba")
    numbers = {"block_count": 2, "context_length": 4096, "feed_forward_length": 0, "attention.head_count": 0}
    for key, number in {**numbers, **MAMBA, "ssm.time_step_rank": 4, "vocab_size": 257}.items():
        writer.add_uint32(f"mamba.{key}", number)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * 257)
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.BYTE] * 256])
    sizes = {"token_embd.weight": (257, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        sizes |= {
            f"blk.{layer}.{name}": size
            for name, size in {
                "attn_norm.weight": (64,),
                "ssm_in.weight": (256, 64),
                "ssm_conv1d.weight": (128, 4),
                "ssm_conv1d.bias": (128,),
                "ssm_x.weight": (36, 128),
                "ssm_dt.weight": (128, 4),
                "ssm_dt.bias": (128,),
                "ssm_a": (128, 16),
                "ssm_d": (128,),
                "ssm_out.weight": (64, 128),
            }.items()
        }
    for name, size in sizes.items():
        writer.add_tensor(name, np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_states_of_recurrent_layers_are_counted_for_every_sequence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = mamba(tmp_path / "mamba.gguf")
    plan = make_plan(ModelSettings(), read_header(path), Memory(64 * GIB))
    listen(caplog)
    GGUFBackend(path, ModelSettings(), lambda _: None).close()

    layout, found = plan.layout, allocated(caplog)
    states = sum(slot.state_bytes for slot in layout.slots)
    assert states == 2 * 4 * layout.max_seqs * (3 * 128 + 16 * 128)
    assert found["CPU", "RS"] == pytest.approx(states, rel=0.01)
    assert found["CPU", "compute"] + found["CPU", "output"] <= layout.workspace_bytes(plan.num_cells)
    assert layout.host_need(0, plan.cache_type) == layout.host_weight_bytes + layout.workspace_bytes(0) + states
