"""What is handed to exllamav2's extension is what EXL2 and GPTQ files hold: a stand-in reads it as the formats say."""

import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from streams import unstream
from torch import Tensor

from bench.gpu.matrices import random_matrix
from tightrope.backends.hf.modules.matrices import Columns, runs_exllama, side_by_side
from tightrope.kernels import dispatch, exllama
from tightrope.kernels.forms.quantized import QuantizedMatrix, dequantize

pytestmark = pytest.mark.quick


class Extension:
    """exllamav2_ext in plain torch, on a CPU."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}  # [K, N] by handle
        self.calls: Counter[tuple[int, ...]] = Counter()  # products, by rows, inputs and outputs

    def make_q_matrix(
        self, q_weight: Tensor, q_perm: Tensor, q_invperm: Tensor, q_scale: Tensor, q_scale_max: Tensor,
        q_groups: Tensor, q_group_map: Tensor, gptq_qzeros: Tensor, gptq_scales: Tensor, *rest: Tensor | int,
    ) -> int:  # fmt: skip
        assert all(tensor.is_meta for tensor in rest[:-1] if isinstance(tensor, Tensor))
        assert gptq_qzeros.is_meta == gptq_scales.is_meta != q_scale.is_meta
        if q_scale.is_meta:
            stored = self.gptq(q_weight, gptq_qzeros, gptq_scales)
        else:
            stored = self.exl2(q_weight, q_scale, q_scale_max, q_groups, q_group_map)
        if not q_perm.is_meta:
            invperm = q_invperm.int() & 0xFFFF
            assert torch.equal((q_perm.int() & 0xFFFF)[invperm], torch.arange(len(stored), dtype=torch.int32))
            stored = stored[invperm]
        self.weights[len(self.weights)] = stored
        return len(self.weights) - 1

    def gptq(self, q_weight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
        """Groups of the smallest power of two that, so often, makes all rows; zero points are stored less one."""
        assert scales.dtype == torch.float16
        codes = unstream(q_weight, 4)
        size = 1
        while size * len(scales) < len(codes):
            size *= 2
        group = torch.arange(len(codes)) // size
        zeros = unstream(qzeros.t().contiguous(), 4).t().float() + 1
        return (codes.float() - zeros[group]) * scales.float()[group]

    def exl2(
        self, q_weight: Tensor, q_scale: Tensor, q_scale_max: Tensor, q_groups: Tensor, q_group_map: Tensor
    ) -> Tensor:
        groups = (q_groups.int() & 0xFFFF).view(-1, 2).tolist()
        ends = [first for _, first in groups[1:]] + [len(q_weight)]
        scales = (unstream(q_scale.t().contiguous(), 4).t().float() + 1).square() * q_scale_max.float()[:, None]
        parts = []
        for (bits, first), end, scale in zip(groups, ends, scales, strict=True):
            parts.append((unstream(q_weight[first:end].contiguous(), bits).float() - (1 << (bits - 1))) * scale)
        rows_left = [[g, len(part) - row] for g, part in enumerate(parts) for row in range(len(part))]
        assert q_group_map.view(-1, 2).tolist() == rows_left
        return torch.cat(parts)

    def gemm_half_q_half(self, a: Tensor, handle: int, c: Tensor, force_cuda: bool) -> None:
        assert a.dtype == c.dtype == torch.float16
        self.calls[len(a), *self.weights[handle].shape] += 1
        c.copy_(a.float() @ self.weights[handle])

    def reconstruct(self, handle: int, output: Tensor) -> None:
        output.copy_(self.weights[handle])

    def free_q_matrix(self, handle: int) -> None:
        self.weights[handle].zero_()


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Extension:
    stand_in = Extension()
    monkeypatch.setattr(exllama, "extension", lambda: stand_in)
    monkeypatch.setattr(exllama, "_timed", set())
    return stand_in


def exl2_matrix(*, is_permuted: bool = True, num_outputs: int = 48) -> QuantizedMatrix:
    sizes = [32, 64, 32, 96, 32, 64]
    return random_matrix(sizes, [8, 6, 5, 4, 3, 2], num_outputs, is_coded=True, is_permuted=is_permuted)


@pytest.mark.parametrize("is_permuted", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 32, 33])
def test_the_extension_gets_the_numbers_of_the_matrix(extension: Extension, num_rows: int, is_permuted: bool):
    matrices = [exl2_matrix(is_permuted=is_permuted), exl2_matrix(is_permuted=is_permuted, num_outputs=64)]
    x, bias = torch.randn(num_rows, 320), torch.randn(112)

    taken = [dispatch.to_exllama(matrix, torch.device("cpu")) for matrix in matrices]
    found = dispatch.exllama_linear(x, taken, bias)

    assert found.dtype == torch.float32
    wanted = x @ torch.cat([dequantize(matrix) for matrix in matrices], 1) + bias
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # float16 numbers, scales rounded to it


@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize(
    ("sizes", "is_permuted"),
    [([128] * 3, True), ([128] * 3, False), ([32] * 4, True), ([64, 64, 32], False), ([96], True)],
)
def test_the_extension_gets_the_numbers_of_gptq(
    extension: Extension, sizes: list[int], is_permuted: bool, has_zeros: bool
):
    matrix = gptq_matrix(sizes, is_permuted=is_permuted, has_zeros=has_zeros)
    x = torch.randn(3, sum(sizes))
    assert dispatch.is_exllama(matrix)

    found = dispatch.exllama_linear(x, [dispatch.to_exllama(matrix, torch.device("cpu"))], None)

    torch.testing.assert_close(found, x @ dequantize(matrix), rtol=1e-2, atol=2e-2)  # float16 numbers


def gptq_matrix(sizes: list[int], *, is_permuted: bool = True, has_zeros: bool = True) -> QuantizedMatrix:
    """Four bits and a zero point of 1 to 16, as a GPTQ file stores them."""
    matrix = random_matrix(sizes, [4] * len(sizes), 48, has_zeros=has_zeros, is_permuted=is_permuted)
    return matrix if matrix.zeros is None else replace(matrix, zeros=matrix.zeros.clamp(min=1))


def test_gptq_that_its_files_cannot_say_stays_with_our_kernels(extension: Extension):
    """Zero points below one, as of gptq_v2 and AWQ; other widths; uneven groups; wider scales; rows of half a word."""
    plain = gptq_matrix([64, 64])
    assert plain.zeros is not None
    assert plain.scales is not None
    assert dispatch.is_exllama(plain)
    assert not dispatch.is_exllama(replace(plain, zeros=plain.zeros * 0))
    assert not dispatch.is_exllama(replace(plain, scales=plain.scales.float()))
    assert not dispatch.is_exllama(random_matrix([64, 64], [8, 8], 32))
    assert not dispatch.is_exllama(random_matrix([32, 64], [4, 4], 32))
    assert not dispatch.is_exllama(random_matrix([48, 48], [4, 4], 32))
    assert not dispatch.is_exllama(random_matrix([16] * 4, [4] * 4, 32))
    assert not dispatch.is_exllama(random_matrix([1 << 16] * 2, [4, 4], 16))


def test_experts_stay_with_the_kernel_that_runs_all_of_them(extension: Extension, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "reads_columns", lambda device: True)

    for matrix in (exl2_matrix(), gptq_matrix([64, 64])):
        assert runs_exllama(side_by_side([matrix], torch.device("cpu")))
        assert isinstance(side_by_side([matrix], torch.device("cpu"), is_expert=True), Columns)


def test_a_matrix_that_is_dropped_is_freed(extension: Extension):
    taken = dispatch.to_exllama(exl2_matrix(), torch.device("cpu"))
    assert extension.weights[taken.handle].any()

    del taken

    assert not extension.weights[0].any()


def test_only_exl2_of_whole_words_and_sorted_widths_goes_to_the_extension(extension: Extension):
    assert dispatch.is_exllama(exl2_matrix())
    assert not dispatch.is_exllama(random_matrix([40], [4], 32, is_coded=True))
    assert not dispatch.is_exllama(random_matrix([32, 32], [4, 5], 32, is_coded=True))  # it takes the widest first


def test_kernels_are_timed_at_load_once_for_each_size(extension: Extension):
    """The extension does so in its first 200 products of up to 4 rows, and waits: no graph could record that."""
    for num_outputs in (48, 64, 64):
        matrix = dispatch.to_exllama(exl2_matrix(num_outputs=num_outputs), torch.device("cpu"))

    assert extension.calls == {(rows, 320, 64): 201 for rows in range(1, 5)}
    dispatch.exllama_linear(torch.randn(1, 320), [matrix], None)
    assert extension.calls[1, 320, 64] == 202


def test_a_head_too_large_to_be_expanded_is_multiplied_as_it_is(extension: Extension, monkeypatch: pytest.MonkeyPatch):
    matrix = dispatch.to_exllama(exl2_matrix(), torch.device("cpu"))
    monkeypatch.setattr(exllama, "MOST_EXPANDED", 320 * 64 - 1)

    dispatch.exllama_linear(torch.randn(33, 320), [matrix], None)

    assert extension.calls[33, 320, 64] == 1


Package = Callable[[dict[str, str]], None]  # It is given the texts of files, by their paths.
TOP, SOURCES, INIT = "exllamav2_ext.py", "exllamav2/ext.py", "exllamav2/__init__.py"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Puts packages where they are imported from, and has the extension looked for anew, in the test and after it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    exllama.extension.cache_clear()

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in ("exllamav2", "exllamav2_ext")]:
        del sys.modules[name]
    exllama.extension.cache_clear()


@pytest.mark.usefixtures("installed")
def test_without_the_extension_none_is_found(caplog: pytest.LogCaptureFixture):
    assert exllama.extension() is None
    assert not caplog.records


@pytest.mark.parametrize(
    "fault",
    [
        "raise ImportError('libcudart.so.12: cannot open shared object file')",
        "raise OSError('CUDA_HOME environment variable is not set')",
        "raise RuntimeError('Error building extension\\nnvcc: not found')",
        "ext_c = exllamav2_ext",  # a NameError, where a wheel is for another CUDA
        "raise SystemExit(1)",
        "raise KeyError('ProgramW6432')",
        "import no_such_package",
        "raise Exception",
    ],
)
@pytest.mark.parametrize(("file", "name"), [(TOP, "exllamav2_ext"), (SOURCES, "exllamav2.ext")])
def test_whatever_its_import_raises_is_one_line_and_leaves_the_threads(
    installed: Package, file: str, name: str, fault: str, caplog: pytest.LogCaptureFixture
):
    """exllamav2 sets torch to one thread when it is imported."""
    to_one = "import torch\ntorch.set_num_threads(1)\n"
    installed({INIT: to_one} | {file: to_one + fault})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = exllama.extension()

        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found is None
    [line] = [record.getMessage() for record in caplog.records]
    assert f"exllamav2 is installed, but {name} can't be used: " in line
    assert "\n" not in line


def test_what_its_sources_were_compiled_to_is_used(installed: Package):
    installed({INIT: "", SOURCES: "ext_c = 'compiled'"})

    assert exllama.extension() == "compiled"


def test_sources_of_another_version_are_told_in_one_line(installed: Package, caplog: pytest.LogCaptureFixture):
    installed({INIT: "", SOURCES: ""})

    assert exllama.extension() is None
    assert "exllamav2.ext can't be used: module 'exllamav2.ext' has no attribute 'ext_c'" in caplog.text


def test_while_its_sources_are_compiled_a_line_says_so(
    installed: Package, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    said = threading.Event()
    monkeypatch.setattr(exllama, "PATIENCE_S", 0.0)
    monkeypatch.setattr(caplog.handler, "emit", lambda record: (caplog.records.append(record), said.set()))
    monkeypatch.setitem(sys.modules, "said", said)  # The import lasts until the line is there.
    installed({INIT: "", SOURCES: "import sys\next_c = sys.modules['said'].wait(60)"})

    assert exllama.extension() is True
    assert [record.getMessage() for record in caplog.records] == [exllama.COMPILING]
