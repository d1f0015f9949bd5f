"""What a rank reads: a matrix of its own outputs alone, its bytes of the files, and as much memory as was planned."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS, FORMATS
from safetensors.torch import load_file, save_file
from test_quant_loading import bytes_of, large_gptq, resident_bytes
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.read_ahead import Range, ReadAhead, reading_ahead
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load import loader
from tightrope.backends.hf.load.blueprint import Blueprint, draw
from tightrope.backends.hf.load.model import build
from tightrope.backends.quant.find import Quantization, find_quantization
from tightrope.backends.tensor_parallel import Share
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, dequantize

SPARE = 8 << 20  # Of what the allocator keeps, and threads.
TINY = FORMATS / "tiny"
PACKED = tuple(sorted(path.name for path in TINY.iterdir() if path.is_dir()))


def quantization_of(folder: Path) -> Quantization:
    checkpoint = Checkpoint.open(folder)
    found = find_quantization(folder, read_config(folder).raw, checkpoint)
    assert found is not None
    return found


def numbers(matrix: QuantizedMatrix | Nf4Matrix | Tensor) -> Tensor:
    """[K, N]"""
    return matrix.t() if isinstance(matrix, Tensor) else dequantize(matrix)


@pytest.mark.parametrize("name", PACKED)
def test_a_matrix_of_a_ranks_outputs_has_the_numbers_of_the_whole_one(name: str):
    found = quantization_of(TINY / name)

    for module in sorted(found.modules)[:8]:
        packed = found.packed(module)
        inputs, outputs = found.format.size(packed)
        whole = numbers(found.format.build(packed, inputs, outputs))
        for begin, end in ((0, 16), (8, 32), (16, outputs)):
            own = found.format.build(replace(packed, own=(begin, end)), inputs, end - begin)

            assert torch.equal(numbers(own), whole[:, begin:end])


def drawn(folder: Path, share: Share) -> Blueprint:
    return draw(folder, read_config(folder), Checkpoint.open(folder), share=share)


def test_words_of_eight_outputs_are_not_cut_and_the_line_names_the_tensor():
    found = quantization_of(TINY / "llama-awq-4bit-32g")
    packed = replace(found.packed("model.layers.0.mlp.up_proj"), own=(0, 12))

    with pytest.raises(BackendError, match=r"up_proj.scales' has|up_proj.qweight' has words of 8 outputs"):
        found.format.build(packed, *found.format.size(packed))


def test_a_rank_does_not_look_at_what_is_not_its_own(tmp_path: Path):
    base = ADAPTERS / "llama-untied-bf16"
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][-1, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())

    build(drawn(tmp_path, Share(0, 2)))

    with pytest.raises(BackendError, match=r"down_proj\.weight. holds NaN"):
        build(drawn(tmp_path, Share(1, 2)))


def asked_of(blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that a load asks for, by the names of the tensors they are of."""
    asked: list[Range] = []

    def noted(ranges: Sequence[Range]) -> AbstractContextManager[ReadAhead]:
        asked.extend(ranges)
        return reading_ahead(ranges)

    with monkeypatch.context() as patched:
        patched.setattr(loader, "reading_ahead", noted)
        build(blueprint)
    found: dict[str, int] = {}
    for file, begin, end in asked:
        entries = blueprint.checkpoint.tensors.values()
        entry = next(one for one in entries if one.file == file and one.begin <= begin < one.end)
        assert end <= entry.end
        found[entry.name] = found.get(entry.name, 0) + end - begin
    return found


@pytest.mark.parametrize("name", ["llama-untied-bf16", "llama-bf16"])
def test_ranks_read_each_byte_of_plain_weights_once_between_them_but_for_norms(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    folder = ADAPTERS / name
    entries = Checkpoint.open(folder).tensors

    asked = [asked_of(drawn(folder, Share(rank, 3)), monkeypatch) for rank in range(3)]

    for tensor, entry in entries.items():
        copies = 3 if len(entry.shape) == 1 else 2 if ".k_proj" in tensor or ".v_proj" in tensor else 1
        found = sum(one[tensor] for one in asked)
        # Three ranks have two heads of keys between them, one of which two ranks have.
        assert found == entry.num_bytes * (1.5 if copies == 2 else copies)


def test_a_rank_reads_its_columns_of_long_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = large_gptq(tmp_path)
    entries = Checkpoint.open(folder).tensors

    asked = asked_of(drawn(folder, Share(1, 2)), monkeypatch)

    for tensor in ("model.layers.0.mlp.up_proj.qweight", "model.layers.5.mlp.gate_proj.qweight", "lm_head.weight"):
        assert asked[tensor] == entries[tensor].num_bytes // 2
    assert all(size <= entries[tensor].num_bytes for tensor, size in asked.items())


@pytest.mark.parametrize("name", PACKED)
def test_headers_tell_the_bytes_that_a_rank_has_in_memory_within_three_hundredths(name: str):
    for blueprint in (drawn(TINY / name, Share(rank, 2)) for rank in range(2)):
        held = bytes_of(build(blueprint).tree)

        assert blueprint.weight_bytes == pytest.approx(held, rel=0.03, abs=4096)


def test_a_rank_takes_its_share_of_the_model_and_the_tensors_of_one_linear_at_most(tmp_path: Path):
    folder = large_gptq(tmp_path)
    build(drawn(TINY / "llama-gptq-4bit-32g-actorder", Share(0, 2)))  # So that libraries and code are in memory.
    blueprint = drawn(folder, Share(0, 2))
    largest = max(tensor.num_bytes for tensor in blueprint.checkpoint.tensors.values())
    before, peak = resident_bytes(), 0

    def progress(share: float) -> None:
        nonlocal peak
        peak = max(peak, resident_bytes())

    model = build(blueprint, progress)

    assert blueprint.weight_bytes < 0.55 * blueprint.checkpoint.weight_bytes
    assert peak - before < blueprint.weight_bytes + largest + SPARE
    assert bytes_of(model.tree) == pytest.approx(blueprint.weight_bytes, rel=0.03)
