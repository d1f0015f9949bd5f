"""Adapters over GGUF files in the torch engine: the logits of the same adapters over the folders that they are for."""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkout import ADAPTERS
from gguf_files import write_adapter, write_model
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.own_gguf.backend import open_own
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings

EXPECTED: Mapping[str, Any] = json.loads((ADAPTERS / "expected.json").read_text("utf-8"))
CLOSE = 1e-2  # Keys and values are kept in float16; adapters move these logits by about 1.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and an adapter as GGUF files."""
    folder = tmp_path_factory.mktemp("gguf")
    write_model(ADAPTERS / "llama-bf16", folder / "llama.gguf")
    for name, dtype in (("lora", np.float32), ("half", np.float16)):
        write_adapter(ADAPTERS / "llama-lora-r4", folder / f"{name}.gguf", ADAPTERS / "llama-bf16", dtype=dtype)
    return folder


def open_model(files: Path, **adapters: Path) -> HFBackend:
    settings = ModelSettings(
        gguf_engine="own",
        max_model_len=256,
        max_num_seqs=4,
        threads=1,
        cache=CacheSettings(tokens=1024, dtype="f16"),
        adapters={name: str(place) for name, place in adapters.items()},
    )
    return open_own(files / "llama.gguf", settings, lambda share: None)


def assert_expected(logits: Tensor, prompt: Mapping[str, Any]) -> None:
    expected = torch.tensor(prompt["top20_logits"])
    torch.testing.assert_close(logits[prompt["top20_ids"]], expected, atol=CLOSE, rtol=0)


def test_adapters_of_both_kinds_and_none_of_them_run_in_one_step(files: Path):
    expected = EXPECTED["llama-lora-r4"]
    adapters = {"file": files / "lora.gguf", "half": files / "half.gguf", "folder": ADAPTERS / "llama-lora-r4"}
    with closing(open_model(files, **adapters)) as backend:
        for prompt, plain in zip(expected["prompts"], expected["prompts_without_adapter"], strict=True):
            asked = [*((prompt, name) for name in adapters), (plain, None)]
            for seq_id, (one, name) in enumerate(asked):
                backend.kv.open(seq_id, one["ids"], f"{name}", reuse="nothing")
                assert backend.kv.reserve(seq_id, len(one["ids"]))

            chunks = [Chunk(seq_id, one["ids"], 0, "last", name) for seq_id, (one, name) in enumerate(asked)]
            for (one, _), row in zip(asked, backend.forward(chunks), strict=True):
                assert_expected(row, one)
            for seq_id in range(len(asked)):
                backend.kv.close(seq_id, keep=False)


def test_an_adapter_in_blocks_of_eight_bits_is_read_as_the_numbers_that_they_stand_for(tmp_path: Path, files: Path):
    def write(path: Path, quantize: bool) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 64.0)
        random = np.random.default_rng(1)
        for name, shape in (("lora_a", (32, 128)), ("lora_b", (128, 32))):
            blocks = gguf.quants.quantize(random.standard_normal(shape).astype(np.float32) / 8, Q8_0)
            values = blocks if quantize else gguf.quants.dequantize(blocks, Q8_0)
            writer.add_tensor(f"blk.0.attn_q.weight.{name}", values, raw_dtype=Q8_0 if quantize else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    with closing(
        open_model(files, blocks=write(tmp_path / "q.gguf", True), plain=write(tmp_path / "f.gguf", False))
    ) as backend:
        rows = []
        for seq_id, name in enumerate(("blocks", "plain", None)):
            backend.kv.open(seq_id, [1, 2, 3, 4], f"{name}", reuse="nothing")
            assert backend.kv.reserve(seq_id, 4)
            rows.append(backend.forward([Chunk(seq_id, [1, 2, 3, 4], 0, "last", name)])[0].clone())

    assert torch.equal(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2], atol=0.01)


Q8_0 = gguf.GGMLQuantizationType.Q8_0


def test_an_adapter_for_another_model_stops_the_start(files: Path):
    with pytest.raises(BackendError, match=r"nowhere\.gguf: no such file"):
        open_model(files, mine=files / "nowhere.gguf")
    with pytest.raises(BackendError, match=r"llama\.gguf: no adapter: general\.type is None"):
        open_model(files, mine=files / "llama.gguf")
