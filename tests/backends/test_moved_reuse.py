"""Moved tokens in the torch engine: the very bits that were stored, turned to where they stand now.

In a model of one layer keys and values depend on their own token alone, so that there moved tokens are exact.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import get_args

import pytest
import torch
from checkout import ADAPTERS
from hf_models import smollm2_bf16
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.modules.step import LayerInfo
from tightrope.backends.hf.movable import why_unmovable
from tightrope.backends.protocol import Chunk
from tightrope.backends.reuse import Reuse, Run, Wanted
from tightrope.backends.settings import CacheSettings, ModelSettings, RopeSettings
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, LayerCache

TINY = ADAPTERS / "llama-bf16"  # Two layers, and two heads of keys for four of queries.
AS_ALONE = 3e-4  # of the logits' size: sums in another order
SYSTEM, OLDEST, SECOND, NEW = range(10, 40), range(100, 170), range(200, 350), range(400, 420)

_fresh_ids = count()


def load(folder: Path = TINY, rope: RopeSettings | None = None, **cache: object) -> HFBackend:
    given = ModelSettings(
        max_num_seqs=4,
        threads=1,
        step_tokens=512,
        cache=CacheSettings(**{"tokens": 4096, **cache}),  # type: ignore[arg-type]
        rope=rope or RopeSettings(),
    )
    return HFBackend(folder, given, lambda _: None)


def chat(*parts: Sequence[int]) -> list[int]:
    return [token for part in parts for token in part]


def run(backend: HFBackend, tokens: list[int], reuse: Wanted, namespace: str = "") -> tuple[Tensor, Reuse, int]:
    """The last logits of a prompt, what was found of it, and its sequence, which stays open."""
    seq_id = next(_fresh_ids)
    found = backend.kv.open(seq_id, tokens, namespace, reuse=reuse)
    missing = found.missing(len(tokens))
    assert backend.kv.reserve(seq_id, sum(map(len, missing)))
    chunks = [Chunk(seq_id, tokens[p.start : p.stop], p.start, "none") for p in missing[:-1]]
    last = missing[-1]
    logits = backend.forward([*chunks, Chunk(seq_id, tokens[last.start :], last.start, "last")])
    for chunk in (*chunks, Chunk(seq_id, tokens[last.start :], last.start, "last")):
        backend.kv.commit(seq_id, chunk.start, chunk.token_ids)
    backend.kv.check_integrity()
    return logits, found, seq_id


def stored(backend: HFBackend, seq_id: int, places: range) -> list[Tensor]:
    """Codes and scales of these tokens in all layers."""
    assert isinstance(backend, HFBackend)
    numbers = torch.from_numpy(backend._pages.block_table(seq_id, places.stop).copy()).long()
    at = torch.tensor(places)
    return [part[numbers[at // 16], :, at % 16].clone() for cache in backend.runner.caches for part in cache.stored]


@pytest.mark.parametrize("dtype", get_args(CacheDtype))
@pytest.mark.parametrize("num_removed", [70, 64, 33])
def test_moved_codes_and_scales_are_those_that_were_stored_to_the_last_bit(dtype: str, num_removed: int) -> None:
    with closing(load(dtype=dtype)) as backend:
        _, _, first = run(backend, chat(SYSTEM, OLDEST[:num_removed], SECOND), "moved")
        _, found, second = run(backend, chat(SYSTEM, SECOND, NEW), "moved")
        moved = found.runs[1]

        before = stored(backend, first, range(moved.source, moved.source + moved.length))
        after = stored(backend, second, range(moved.start, moved.stop))

        assert moved == Run(30 + num_removed + 64, 30 + 64, 150 - 64, is_exact=False)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True), st.integers(20, 70))
def test_whatever_is_removed_what_stays_is_bit_for_bit_what_was_stored(removed: list[int], length: int) -> None:
    backend = _shared()
    name = f"{next(_fresh_ids)}"
    messages = [list(range(40 + 50 * i, 40 + 50 * i + length)) for i in range(9)]
    _, _, first = run(backend, chat(SYSTEM, *messages)[:500], "moved", name)
    tokens = chat(SYSTEM, *(m for i, m in enumerate(messages) if i not in removed))[:490]
    _, found, second = run(backend, [*tokens, 7], "moved", name)

    for part in found.runs:
        before = stored(backend, first, range(part.source, part.source + part.length))
        after = stored(backend, second, range(part.start, part.stop))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for seq_id in (first, second):
        backend.kv.close(seq_id, keep=False)


_loaded: list[HFBackend] = []


def _shared() -> HFBackend:
    if not _loaded:
        _loaded.append(load(dtype="q8"))
    return _loaded[0]


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _loaded:
        _loaded.pop().close()


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-layer")
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((TINY / "config.json").read_text("utf-8")) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = {name: tensor for name, tensor in load_file(TINY / "model.safetensors").items() if ".1." not in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


ROPES = {
    "as trained": RopeSettings(),
    "linear": RopeSettings(kind="linear", factor=2),
    "ntk": RopeSettings(kind="ntk", factor=2),
    "dynamic": RopeSettings(kind="dynamic", factor=2),
    "yarn": RopeSettings(kind="yarn", factor=4, original_len=128),
    "llama3": RopeSettings(kind="llama3", factor=4, original_len=128),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("dtype", get_args(CacheDtype))
def test_in_a_model_of_one_layer_moved_tokens_give_the_logits_of_a_cold_run(
    one_layer: Path, rope: RopeSettings, dtype: str
) -> None:
    with closing(load(one_layer, rope, dtype=dtype)) as backend:
        run(backend, chat(SYSTEM, OLDEST, SECOND), "moved")

        moved, found, _ = run(backend, chat(SYSTEM, SECOND, NEW), "moved")
        cold, nothing, _ = run(backend, chat(SYSTEM, SECOND, NEW), "nothing")

        assert found.num_inexact == 150 - 64
        assert nothing == Reuse()
        assert (moved - cold).abs().max() < AS_ALONE * cold.abs().max()


def test_dynamic_ntk_moves_among_equal_frequencies_alone(one_layer: Path) -> None:
    """Beyond the trained window each length has its own."""
    rope = RopeSettings(kind="dynamic", factor=4, original_len=128)
    with closing(load(one_layer, rope, dtype="q8")) as backend:
        run(backend, chat(SYSTEM, OLDEST, SECOND), "moved")

        for num_new, num_moved in ((69, 0), (70, 150 - 64), (71, 0)):
            _, found, seq_id = run(backend, chat(SYSTEM, SECOND, range(420, 420 + num_new)), "moved")
            assert found.num_inexact == num_moved
            backend.kv.close(seq_id, keep=False)


def test_a_step_that_fails_leaves_copies_to_be_made_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(load(dtype="q8")) as backend:
        _, _, first = run(backend, chat(SYSTEM, OLDEST, SECOND), "moved")
        copy, num_failed = dispatch.copy_slots, 0

        def fails_at_first(cache: LayerCache, sources: Tensor, targets: Tensor) -> None:
            nonlocal num_failed
            copy(cache, sources, targets)
            if cache is backend.runner.caches[-1] and not num_failed:
                num_failed += 1
                raise RuntimeError("out of memory")

        monkeypatch.setattr(dispatch, "copy_slots", fails_at_first)
        with pytest.raises(Exception, match="out of memory"):
            run(backend, chat(SYSTEM, SECOND, NEW), "moved")
        _, found, second = run(backend, chat(SYSTEM, SECOND, NEW), "moved")

        moved = found.runs[1]
        before = stored(backend, first, range(moved.source, moved.source + moved.length))
        after = stored(backend, second, range(moved.start, moved.stop))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sliding")
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 200}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("slides", "reuse", "says"),
    [
        (False, "moved", "cached tokens: what stands behind a removed message is moved"),
        (False, "exact", "cached tokens: exact ones alone, as asked"),
        (True, "moved", "cached tokens: exact ones alone, since some layers see a window alone"),
    ],
)
def test_the_start_says_what_is_moved_and_that_is_so(slides: bool, reuse: str, says: str, sliding: Path) -> None:
    with closing(load(sliding if slides else TINY, reuse=reuse)) as backend:
        run(backend, chat(SYSTEM, OLDEST, SECOND), "moved")
        _, found, _ = run(backend, chat(SYSTEM, SECOND, NEW), "moved")

        (note,) = [note for note in backend.card.notes if note.startswith("cached tokens: ")]
        assert note.startswith(says)
        assert (found.num_inexact > 0) is ("is moved" in says)


def test_keys_that_are_cached_where_they_stand_are_not_moved() -> None:
    rotated = LayerInfo(2, 32, AttentionSpec(1.0), None)
    plain = LayerInfo(2, 32, AttentionSpec(1.0), "full")

    assert why_unmovable([plain, plain]) is None
    assert why_unmovable([plain, rotated]) == "some layers cache keys that say where they stand"


def test_on_a_real_model_moved_tokens_come_close_to_exact_ones() -> None:
    with closing(load(smollm2_bf16(), dtype="q8")) as backend:
        words = (
            "The harbour lay still under a grey sky, and the gulls had gone inland before the storm. Mira counted the "
            "boats twice, as she did each evening, and wrote the number into the book that her father had begun. "
        )
        ids = backend.tokenizer.encode(words * 8, parse_special=False, is_start=False)
        run(backend, chat(ids[:60], ids[100:180], ids[180:400]), "moved")

        moved, found, _ = run(backend, chat(ids[:60], ids[180:400]), "moved")
        cold, _, _ = run(backend, chat(ids[:60], ids[180:400]), "nothing")

        assert found.num_inexact > 100
        expected = cold.double().log_softmax(-1)
        assert (expected.exp() * (expected - moved.double().log_softmax(-1))).sum() < 0.02
