"""Perplexity and divergence against plain float64 sums, and the command that prints them."""

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from error_bounds import UNIT, roundings
from fakes import BOS, VOCAB_SIZE, FakeBackend
from gguf_models import lone_logits
from hf_models import smollm2_bf16
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import CacheSettings, KVCacheDtype, ModelSettings
from tightrope.engine.perplexity import compare, compare_layers, cut_windows, layer_runs, measure, window_bos
from tightrope.server.cli.main import main

PROSE = "The Danube rises in the Black Forest and flows through ten countries before it meets the Black Sea. "


class ScatteredBackend(FakeBackend):
    """Logits drawn at random, by the tokens so far; `noise` times other draws are added, as by a coarser cache."""

    def __init__(self, noise: float = 0.0, *, max_step_tokens: int = 64, max_num_seqs: int = 8) -> None:
        super().__init__(max_step_tokens=max_step_tokens, max_num_seqs=max_num_seqs)
        self.noise = noise

    def _row(self, so_far: Sequence[int]) -> torch.Tensor:
        draw = np.random.default_rng(list(so_far))
        logits = 4 * draw.standard_normal(VOCAB_SIZE) + 100 * draw.standard_normal()
        logits += self.noise * draw.standard_normal(VOCAB_SIZE)
        logits[256:] = -math.inf  # as some models write for tokens that never come
        return torch.from_numpy(logits.astype(np.float32))

    def logprobs(self, window: Sequence[int]) -> np.ndarray:
        """[n - 1, 256] float64 log-probabilities of what follows each token but the last."""
        logits = np.stack([self._row(window[: i + 1])[:256].double().numpy() for i in range(len(window) - 1)])
        return (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 255), min_size=40, max_size=100),
    st.integers(2, 40),
    st.integers(1, 64),
    st.integers(1, 4),
    st.floats(0.001, 3),
)
def test_scores_are_the_plain_sums_however_the_windows_are_cut_into_steps(
    token_ids: list[int], context: int, step: int, seqs: int, noise: float
):
    windows = cut_windows(token_ids, context, None)
    base = ScatteredBackend(max_step_tokens=step, max_num_seqs=seqs)
    other = ScatteredBackend(noise, max_step_tokens=step, max_num_seqs=seqs)

    first, second = compare(base, [other], windows, lambda _: None)

    # of a row's total: its exponents' roundings, whose mean, by their weights, is at most log V, those of the
    # exponentials, and those of the sum, a cascade in which no number takes part in more than 32 additions
    total_off = UNIT * math.log(256) + 2e-7 + roundings(32)
    nll = other_nll = divergence = off = 0.0
    for window in windows:
        p, q = base.logprobs(window), other.logprobs(window)
        chosen = (np.arange(context - 1), np.array(window[1:]))
        nll -= p[chosen].sum()
        other_nll -= q[chosen].sum()
        divergence += (np.exp(p) * (p - q)).sum()
        # each ratio's roundings and each probability's, of the numbers that they are made of, its total's and the sum's
        rounding = 8 * UNIT * (np.abs(p) + np.abs(q) + 2 * np.log(256))
        off += (np.exp(p) * (rounding + (rounding + 2 * total_off) * np.abs(p - q))).sum()
    assert first.num_tokens == second.num_tokens == len(windows) * (context - 1)
    tokens_off = first.num_tokens * total_off
    assert (first.nll, second.nll) == pytest.approx((nll, other_nll), rel=2 * UNIT, abs=tokens_off)
    assert second.divergence == pytest.approx(divergence, abs=off + 2 * tokens_off)
    assert first.divergence == 0
    assert base.kv.usage().used == other.kv.usage().used == 0


def test_perplexity_is_the_exponential_of_the_mean():
    windows = cut_windows(list(range(60)), 20, BOS)
    score = measure(ScatteredBackend(), windows, lambda _: None)

    assert score.perplexity == pytest.approx(math.exp(score.nll / (3 * 19)))


def test_a_cache_that_changes_nothing_diverges_by_nothing():
    windows = cut_windows(list(PROSE.encode()), 30, None)
    first, second = compare(ScatteredBackend(), [ScatteredBackend()], windows, lambda _: None)

    assert abs(second.mean_divergence) < 1e-7
    assert second.perplexity == first.perplexity


def test_progress_counts_every_predicted_token_of_every_backend():
    counted: list[int] = []
    compare(ScatteredBackend(), [ScatteredBackend()], cut_windows(list(range(64)), 16, None), counted.append)

    assert sum(counted) == 2 * 4 * 15


@given(st.integers(1, 300), st.integers(2, 50), st.booleans(), st.integers(0, 300))
def test_windows_are_disjoint_pieces_of_the_text_in_order_and_within_the_bound(
    length: int, context: int, has_bos: bool, max_tokens: int
):
    windows = cut_windows(range(length), context, BOS if has_bos else None, max_tokens)

    assert all(len(window) == context for window in windows)
    pieces = [window[has_bos:] for window in windows]
    assert all(window[0] == BOS for window in windows if has_bos)
    assert [piece for piece in pieces if piece != list(range(piece[0], piece[0] + context - has_bos))] == []
    text = [token_id for piece in pieces for token_id in piece]
    assert text == sorted(set(text))
    fitting = length // (context - has_bos)
    assert len(windows) == (min(fitting, max(1, max_tokens // context)) if max_tokens else fitting)


def test_bounded_windows_reach_into_the_last_part_of_the_text():
    starts = [window[0] for window in cut_windows(range(1000), 10, None, max_tokens=50)]

    assert starts == [0, 200, 400, 600, 800]


def test_a_model_without_numbers_has_no_perplexity():
    backend = ScatteredBackend(noise=math.nan)
    score = measure(backend, cut_windows(list(range(20)), 10, None), lambda _: None)

    with pytest.raises(BackendError, match="not finite"):
        _ = score.perplexity


def test_a_window_that_the_cache_cannot_hold_is_refused_with_both_numbers():
    backend = FakeBackend(capacity=16)

    with pytest.raises(BackendError, match="holds 16 tokens; windows of 20 need more"):
        measure(backend, cut_windows(list(range(40)), 20, None), lambda _: None)
    assert backend.kv.usage().used == 0


# ---- llama.cpp ----


def test_the_perplexity_of_a_gguf_model_is_that_of_its_logits():
    cache = CacheSettings(tokens=512, dtype="f16")
    backend = GGUFBackend(bundled_model(), ModelSettings(max_model_len=128, cache=cache), lambda _: None)
    token_ids = backend.tokenizer.encode(PROSE * 8, parse_special=False, is_start=True)
    windows = cut_windows(token_ids, 64, window_bos(backend.tokenizer))
    assert len(windows) > 1

    found = measure(backend, windows, lambda _: None)

    losses = [
        torch.nn.functional.cross_entropy(lone_logits(backend, w)[:-1].double(), torch.tensor(w[1:])) for w in windows
    ]
    expected = float(torch.stack(losses).mean())
    backend.close()
    # windows side by side run in kernels of another shape, which round activations to 8 bits
    assert found.nll / found.num_tokens == pytest.approx(expected, abs=0.01)


# ---- the torch engine ----


@pytest.fixture(scope="module")
def base() -> Iterator[HFBackend]:
    """SmolLM2 in bf16 with an f16 cache."""
    loaded = HFBackend(smollm2_bf16(), in_torch("f16"), lambda _: None)
    yield loaded
    loaded.close()


def in_torch(dtype: KVCacheDtype) -> ModelSettings:
    return ModelSettings(max_model_len=64, step_tokens=48, cache=CacheSettings(tokens=64, dtype=dtype))


@pytest.fixture(scope="module")
def windows(base: HFBackend) -> list[list[int]]:
    token_ids = base.tokenizer.encode(PROSE * 8, parse_special=False, is_start=True)
    return cut_windows(token_ids, 64, window_bos(base.tokenizer), max_tokens=128)


def test_the_perplexity_of_a_torch_model_is_that_of_transformers_own_loss(base: HFBackend, windows: list[list[int]]):
    untouched = AutoModelForCausalLM.from_pretrained(smollm2_bf16(), dtype=torch.float32)
    with torch.inference_mode():
        batch = torch.tensor(windows)
        expected = float(untouched(batch, labels=batch).loss)

    score = measure(base, windows, lambda _: None)

    # the cache rounds keys and values to 11 bits
    assert score.nll / score.num_tokens == pytest.approx(expected, rel=2e-4)


def test_a_variant_of_the_cache_is_what_a_model_loaded_with_it_has(base: HFBackend, windows: list[list[int]]):
    variants = base.variants()
    alone = HFBackend(smollm2_bf16(), in_torch("q4"), lambda _: None)
    same, q4 = (variants.variant([dtype] * variants.num_layers) for dtype in ("f16", "q4"))

    scores = compare(base, [same, q4, alone], windows, lambda _: None)

    alone.close()
    assert scores[1].nll == scores[0].nll
    assert scores[2].nll == pytest.approx(scores[3].nll, rel=1e-6)
    assert scores[2].divergence == pytest.approx(scores[3].divergence, rel=1e-5)
    assert scores[2].mean_divergence > 0.001
    assert q4.card.cache_token_bytes == alone.card.cache_token_bytes


def test_quantizing_the_cache_of_one_layer_costs_less_than_that_of_all(base: HFBackend, windows: list[list[int]]):
    variants, short = base.variants(), [windows[0][:16]]
    counted: list[int] = []
    whole = compare(base, [variants.variant(["q4"] * variants.num_layers)], short, lambda _: None)[1]

    _, *layers = compare_layers(base, variants, "q4", short, counted.append)

    assert len(layers) == variants.num_layers == 30
    assert all(0 < layer.mean_divergence < whole.mean_divergence for layer in layers)
    assert sum(counted) == layer_runs(30) * 15


# ---- the command ----


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "danube.txt"
    path.write_text(PROSE * 40, "utf-8")
    return path


def test_the_command_prints_a_table_and_writes_json_and_plot(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results, picture = tmp_path / "out.json", tmp_path / "out.png"
    wanted = ["--text", str(text), "--contexts", "64,32", "--max-tokens", "128", "--rope-scaling", "linear"]
    files = ["--json", str(results), "--plot", str(picture)]

    assert main(["perplexity", *wanted, "--rope-factor", "1.5", *files]) == 0

    lines = capsys.readouterr().out.splitlines()
    found = json.loads(results.read_text())
    assert any(line.startswith("model     SmolLM2-135M-Instruct") for line in lines)
    assert any("linear" in line and "1.5" in line for line in lines)
    assert [line.split()[:3] for line in lines[-2:]] == [["32", "4", "124"], ["64", "2", "126"]]
    assert [float(line.split()[3]) for line in lines[-2:]] == [
        pytest.approx(row["perplexity"], abs=1e-4) for row in found["rows"]
    ]
    assert found["text"]["file"] == "danube.txt"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_comparing_caches_prints_divergence_change_and_bytes(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = tmp_path / "out.json"
    wanted = ["--text", str(text), "--contexts", "64", "--max-tokens", "128", "--compare-kv", "q4, q8"]

    assert main(["perplexity", "--gguf-engine=llama.cpp", *wanted, "--json", str(results)]) == 0

    f16, q8, q4 = json.loads(results.read_text())["rows"]
    assert [row["cache"] for row in (f16, q8, q4)] == ["f16", "q8", "q4"]
    # SmolLM2: 30 layers, 3 heads of 64; llama.cpp adds a scale of 2 bytes to every 32 values
    assert [row["bytes_per_token"] for row in (f16, q8, q4)] == [30 * 2 * 3 * 64 * bits / 8 for bits in (16, 8.5, 4.5)]
    assert (f16["kl"], f16["change"]) == (None, None)
    assert 0 < q8["kl"] < q4["kl"]
    assert q4["change"] == pytest.approx(q4["perplexity"] / f16["perplexity"] - 1)
    assert f"{q4['kl']:.6f}" in capsys.readouterr().out.splitlines()[-1]


def test_comparing_caches_on_the_torch_engine_adds_a_line_for_each_layer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = tmp_path / "out.json"
    wanted = ["--text", str(text), "--contexts", "16", "--max-tokens", "16", "--compare-kv", "q8"]

    assert main(["perplexity", str(smollm2_bf16()), *wanted, "--json", str(results)]) == 0

    found = json.loads(results.read_text())
    assert [row["cache"] for row in found["rows"]] == ["f16", "q8"]
    assert [row["layer"] for row in found["layers"]] == list(range(30))
    last = found["layers"][-1]
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "29", "q8", f"{last['change']:+.3%}", f"{last['kl']:.7f}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: --text"),
        (["--text", "a", "--contexts", "64,x"], "--contexts: should be numbers from 2 up with commas between, not 'x'"),
        (["--text", "a", "--contexts", "1"], "--contexts: should be numbers from 2 up"),
        (["--text", "a", "--contexts", "64", "-c", "32"], "--contexts: 64 is longer than --max-model-len 32"),
        (["--text", "a", "--contexts", "64", "--kv-cache-tokens", "32"], "longer than --kv-cache-tokens 32"),
        (["--text", "a", "--compare-kv", "q5"], "--compare-kv: should be q8, q4 or q8,q4, not 'q5'"),
        (["--text", "a", "--compare-kv", "q8", "--kv-cache", "q8"], "leave out --kv-cache"),
        (["--text", "a", "--max-tokens", "0"], "--max-tokens: should be a positive number"),
        (["--text", "a", "--plot", "a.gif"], "--plot: should be a file that ends in .png"),
        (["--text", "a", "--json", "/no/such/folder/a.json"], "--json: /no/such/folder/a.json can't be written"),
    ],
)
def test_a_setting_that_cannot_be_understood_is_one_line_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
):
    try:
        status: object = main(["perplexity", *arguments])
    except SystemExit as end:  # as argparse ends
        status = end.code

    [line] = capsys.readouterr().err.splitlines()
    assert status == 2
    assert part in line


def test_a_plot_without_matplotlib_is_refused_before_anything_is_loaded(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert main(["perplexity", "--text", str(text), "--plot", str(text.with_suffix(".png"))]) == 2
    assert capsys.readouterr().err == (
        "tightrope: --plot: draws with matplotlib, which is not installed: pip install matplotlib\n"
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"Too short.", "too few for a context of 64"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line_and_status_1(
    content: bytes | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)

    status = main(["perplexity", "--text", str(path), "--contexts", "64"])

    [line] = capsys.readouterr().err.splitlines()
    assert status == 1
    assert str(path) in line
    assert part in line
