"""The torch backend on the real SmolLM2: the text of transformers, however the work is cut up, shared and repeated."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import PROSE
from engine_runs import request, run
from hf_models import smollm2_bf16
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.load.inspection import model_id
from tightrope.backends.protocol import Chunk
from tightrope.backends.reuse import Reuse
from tightrope.backends.settings import CacheSettings, ModelSettings, RopeSettings
from tightrope.engine.core import EngineCore
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Delta, TokenPrompt
from tightrope.kernels.forms.layout import PAGE

# Keys and values of 11 bits against the 24 of transformers' move logits by 5e-4 of their size.
AS_FLOAT32 = 1e-3
# Sums in another order round otherwise in the last bits, and now and then a cached number falls to the other side.
AS_ALONE = 3e-4

NUM_TOKENS = 64

# Questions in whose answers no two tokens are nearly tied: the best is 0.04 before the second at every step.
QUESTIONS = (
    "Write a Python function that adds two numbers.",
    "Give me a recipe for pancakes.",
    "Write a for loop in Python that prints the numbers from 1 to 10.",
    "What is DNA?",
    "Explain what a prime number is and give examples.",
    "Name three rivers of Europe and say where each one ends.",
    "Write a Python function that reverses a string.",
    "Count from one to thirty.",
    "How do birds fly?",
    "What is the boiling point of water?",
)

_fresh_ids = count(10_000)


def load(folder: Path | None = None, rope: RopeSettings | None = None, **changed: Any) -> HFBackend:  # noqa: ANN401
    """SmolLM2 with an f16 cache; `changed` are settings, tokens and dtype those of the cache."""
    given = {"tokens": 4096, "dtype": "f16", "max_model_len": 1024, "max_num_seqs": 12, "step_tokens": 256} | changed
    cache = CacheSettings(tokens=given.pop("tokens"), dtype=given.pop("dtype"))
    settings = ModelSettings(cache=cache, rope=rope or RopeSettings(), **given)
    return HFBackend(folder or smollm2_bf16(), settings, lambda _: None)


@pytest.fixture(scope="module")
def backend() -> Iterator[HFBackend]:
    loaded = load()
    yield loaded
    loaded.kv.check_integrity()
    loaded.close()


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    """transformers' own model, in float32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_bf16(), dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture(scope="module")
def prompts(backend: HFBackend) -> list[list[int]]:
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    return [backend.tokenizer.encode(text, parse_special=True, is_start=True) for text in texts]


@pytest.fixture(scope="module")
def their_answers(theirs: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """NUM_TOKENS likeliest tokens after each prompt, by `generate`."""
    width = max(map(len, prompts))
    padded = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        whole = theirs.generate(padded, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=2)
    answers: list[list[int]] = whole[:, width:].tolist()
    return answers


@pytest.fixture(scope="module")
def text_ids(backend: HFBackend) -> list[int]:
    """300 tokens of sensible text."""
    text = PROSE.read_text("utf-8")
    return backend.tokenizer.encode(text, parse_special=False, is_start=True)[:300]


def answers_of(core: EngineCore, prompts: Mapping[str, Sequence[int]], n: int = 1) -> dict[str, list[Delta]]:
    """The deltas of greedy requests, all queued at once."""
    requests = (request(name, TokenPrompt(tuple(ids)), n=n, max_tokens=NUM_TOKENS) for name, ids in prompts.items())
    return run(core, *requests)


def tokens_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token.token_id for delta in deltas if delta.index == index for token in delta.tokens]


def written(core: EngineCore, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the core answers to all prompts side by side."""
    deltas = answers_of(core, {str(i): prompt for i, prompt in enumerate(prompts)})
    return [tokens_of(deltas[str(i)]) for i in range(len(prompts))]


def lone_logits(backend: HFBackend, token_ids: Sequence[int]) -> Tensor:
    """[n, V] logits of a sequence that shares nothing, run in one step as far as one goes."""
    return run_pieces(backend, token_ids, [backend.capabilities.max_step_tokens] * 9)


def run_pieces(backend: HFBackend, token_ids: Sequence[int], sizes: Sequence[int], *, reuse: bool = False) -> Tensor:
    """Logits of all tokens that aren't found cached, run in pieces of these sizes; the sequence stays matchable."""
    seq_id = next(_fresh_ids)
    start = backend.kv.open(seq_id, token_ids, "", reuse="exact" if reuse else "nothing").num_tokens
    rows = []
    for size in sizes:
        part = token_ids[start : start + size]
        if part:
            assert backend.kv.reserve(seq_id, len(part))
            rows.append(backend.forward([Chunk(seq_id, part, start, "all")]))
            backend.kv.commit(seq_id, start, part)
            start += len(part)
    backend.kv.close(seq_id, keep=True)
    return torch.cat(rows)


def error(logits: Tensor, expected: Tensor) -> float:
    """The norm of the difference, of the norm of what is expected."""
    assert logits.shape == expected.shape
    return float((logits - expected).norm() / expected.norm())


# ---- the text of transformers ----


def test_ten_prompts_side_by_side_get_the_text_that_transformers_generates(
    backend: HFBackend, prompts: list[list[int]], their_answers: list[list[int]]
) -> None:
    core = EngineCore(backend, LimitSettings())
    assert written(core, prompts) == their_answers
    assert written(core, prompts[:3]) == their_answers[:3]  # found cached now


def test_a_lone_prompt_gets_the_same_text_as_among_others(
    backend: HFBackend, prompts: list[list[int]], their_answers: list[list[int]]
) -> None:
    core = EngineCore(backend, LimitSettings())
    assert written(core, prompts[-1:]) == their_answers[-1:]


def test_prompts_in_small_pieces_and_preempted_answers_are_the_same_text(
    prompts: list[list[int]], their_answers: list[list[int]]
) -> None:
    tight = load(tokens=512, max_model_len=256, step_tokens=16)
    core = EngineCore(tight, LimitSettings())
    assert written(core, prompts) == their_answers
    assert core.stats().preemptions > 0
    tight.close()


def test_the_choices_of_a_request_share_their_prompt_and_write_apart(
    backend: HFBackend, prompts: list[list[int]], their_answers: list[list[int]]
) -> None:
    core = EngineCore(backend, LimitSettings())
    deltas = answers_of(core, {"r": prompts[1]}, n=3)["r"]
    assert [tokens_of(deltas, index) for index in range(3)] == [their_answers[1]] * 3
    cached = [delta.prompt.num_cached for delta in deltas if delta.prompt is not None and delta.index > 0]
    assert cached == [len(prompts[1]) - 1] * 2


def test_logits_are_those_of_transformers(backend: HFBackend, theirs: PreTrainedModel, text_ids: list[int]) -> None:
    with torch.inference_mode():
        expected = theirs(torch.tensor([text_ids])).logits[0]
    assert error(lone_logits(backend, text_ids), expected) < AS_FLOAT32


# ---- however it is run ----


def test_a_prompt_run_in_pieces_gives_the_logits_of_a_lone_run(backend: HFBackend, text_ids: list[int]) -> None:
    alone = lone_logits(backend, text_ids)
    assert error(run_pieces(backend, text_ids, [1, 40, 1, 200, 7, 51]), alone) < AS_ALONE


def test_a_reused_prefix_gives_the_logits_of_a_lone_run(backend: HFBackend, text_ids: list[int]) -> None:
    branch = [*text_ids[:90], *reversed(text_ids[:30])]
    alone = lone_logits(backend, branch)
    lone_logits(backend, text_ids)
    for _ in range(2):  # from the text, then from the branch itself
        logits = run_pieces(backend, branch, [256], reuse=True)
        assert len(logits) <= 30
        assert error(logits, alone[-len(logits) :]) < AS_ALONE


def test_sequences_in_one_step_do_not_disturb_each_other(backend: HFBackend, text_ids: list[int]) -> None:
    parts = [text_ids[:50], text_ids[50:51], text_ids[60:95]]
    alone = [lone_logits(backend, part) for part in parts]
    for seq_id, part in enumerate(parts):
        backend.kv.open(seq_id, part, f"together {seq_id}")
        assert backend.kv.reserve(seq_id, len(part))
    chunks = [Chunk(0, parts[0], 0, "last"), Chunk(1, parts[1], 0, "all"), Chunk(2, parts[2][:10], 0, "none")]
    logits = backend.forward(chunks)
    assert logits.shape == (2, backend.tokenizer.vocab_size)
    assert error(logits, torch.stack([alone[0][-1], alone[1][0]])) < AS_ALONE
    backend.kv.commit(2, 0, parts[2][:10])
    rest = backend.forward([Chunk(2, parts[2][10:], 10, "last")])
    assert error(rest, alone[2][-1:]) < AS_ALONE
    for seq_id in range(3):
        backend.kv.close(seq_id, keep=False)


def test_a_step_that_wants_no_logits_returns_none(backend: HFBackend, text_ids: list[int]) -> None:
    backend.kv.open(1, text_ids[:5], "none")
    assert backend.kv.reserve(1, 5)
    assert backend.forward([Chunk(1, text_ids[:5], 0, "none")]).shape == (0, backend.tokenizer.vocab_size)
    backend.kv.close(1, keep=False)


def test_the_logits_may_be_changed_in_place(backend: HFBackend, text_ids: list[int]) -> None:
    backend.kv.open(1, text_ids[:5], "change")
    assert backend.kv.reserve(1, 5)
    logits = backend.forward([Chunk(1, text_ids[:5], 0, "last")])
    logits.fill_(0.0)
    assert not logits.any()
    backend.kv.close(1, keep=False)


# ---- frequencies by length ----


def variant_of_smollm2(folder: Path, **config: object) -> Path:
    """The model's folder with another config.json; the weights are linked."""
    for file in smollm2_bf16().iterdir():
        (folder / file.name).hardlink_to(file)
    path = folder / "config.json"
    changed = json.loads(path.read_text("utf-8")) | config
    path.unlink()
    path.write_text(json.dumps(changed), "utf-8")
    return folder


SCALINGS: dict[str, dict[str, object]] = {
    "dynamic": {
        "max_position_embeddings": 128,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "longrope": {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 32,
            "long_factor": [1.0 + i / 16 for i in range(32)],
            "original_max_position_embeddings": 128,
        },
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_prompts_of_different_length_in_one_batch_equal_fresh_computations_of_transformers(
    kind: str, tmp_path: Path, text_ids: list[int]
) -> None:
    """Lengths within and beyond the trained window of 128, run in the same steps, in pieces of 60 tokens."""
    folder = variant_of_smollm2(tmp_path, **SCALINGS[kind])
    loaded = load(folder, max_model_len=512)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = [text_ids[:100], text_ids[50:220], text_ids[60:300]]
    with torch.inference_mode():
        expected = [theirs(torch.tensor([part])).logits[0, -1] for part in parts]
    for _ in range(2):  # then with what is cached of them
        rows: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
        starts = {i: loaded.kv.open(i, part, "").num_tokens for i, part in enumerate(parts)}
        while any(starts[i] < len(part) for i, part in enumerate(parts)):
            chunks = [
                Chunk(i, part[starts[i] : starts[i] + 60], starts[i], "last")
                for i, part in enumerate(parts)
                if starts[i] < len(part)
            ]
            assert all(loaded.kv.reserve(chunk.seq_id, len(chunk.token_ids)) for chunk in chunks)
            for chunk, row in zip(chunks, loaded.forward(chunks), strict=True):
                loaded.kv.commit(chunk.seq_id, chunk.start, chunk.token_ids)
                starts[chunk.seq_id] += len(chunk.token_ids)
                rows[chunk.seq_id].append(row)
        for i in range(len(parts)):
            loaded.kv.close(i, keep=True)
            assert error(rows[i][-1], expected[i]) < 2 * AS_FLOAT32
    loaded.close()


def test_what_was_computed_with_other_frequencies_is_not_reused(tmp_path: Path, text_ids: list[int]) -> None:
    loaded = load(variant_of_smollm2(tmp_path, **SCALINGS["dynamic"]), max_model_len=512)
    long, short = text_ids[:240], text_ids[:120]
    alone = lone_logits(loaded, long)
    lone_logits(loaded, short)
    assert loaded.kv.open(1, text_ids[:250], "") == Reuse()
    assert loaded.kv.open(2, [*short[:90], 5, 6], "") == Reuse.prefix(90)  # all within the trained window agree
    loaded.kv.close(1, keep=False)
    loaded.kv.close(2, keep=False)
    assert error(run_pieces(loaded, long, [256] * 2, reuse=True), alone[-1:]) < AS_ALONE
    loaded.close()


def test_rope_settings_reach_the_model(backend: HFBackend, text_ids: list[int]) -> None:
    plain = lone_logits(backend, text_ids[:60])
    by_base = load(rope=RopeSettings(theta=100000.0 * 8 ** (64 / 62)))  # what NTK by 8 means for a head of 64
    expected = lone_logits(by_base, text_ids[:60])
    for kind in ("linear", "ntk"):
        scaled = load(rope=RopeSettings(kind=kind, factor=8.0))
        logits = lone_logits(scaled, text_ids[:60])
        assert error(logits[20:], plain[20:]) > 0.02, kind
        assert error(logits[:1], plain[:1]) < AS_ALONE, kind  # nothing turns at position 0
        if kind == "ntk":
            assert error(logits, expected) < AS_ALONE
        scaled.close()
    by_base.close()


# ---- the cache ----


@pytest.fixture(scope="module")
def eight_bits() -> Iterator[HFBackend]:
    loaded = load(dtype="q8", tokens=1000)
    yield loaded
    loaded.kv.check_integrity()
    loaded.close()


def test_eight_bits_stay_close_to_sixteen(backend: HFBackend, eight_bits: HFBackend, text_ids: list[int]) -> None:
    expected, got = (lone_logits(b, text_ids).log_softmax(-1) for b in (backend, eight_bits))
    divergence = (expected.exp() * (expected - got)).sum(-1)
    assert divergence.mean() < 4e-4  # nats


def test_keys_of_few_bits_are_divided_by_their_channels_magnitude(backend: HFBackend, eight_bits: HFBackend) -> None:
    assert all((cache.key_factor == 1).all() for cache in backend.runner.caches)
    for cache in eight_bits.runner.caches:
        assert cache.key_factor.isfinite().all()
        assert (cache.key_factor > 0).all()
        assert cache.key_factor.amax() / cache.key_factor.amin() > 3  # channels differ


def test_the_cache_takes_the_bytes_that_were_planned(eight_bits: HFBackend) -> None:
    taken = sum(
        tensor.nbytes
        for cache in eight_bits.runner.caches
        for tensor in (cache.key_codes, cache.key_scales, cache.value_codes, cache.value_scales)
    )
    capacity = eight_bits.kv.usage().capacity
    assert capacity == 1008  # whole pages
    assert taken == capacity * eight_bits.card.cache_token_bytes


# ---- what it says, and what goes wrong ----


def test_the_card_tells_what_was_loaded(backend: HFBackend) -> None:
    card = backend.card
    assert (card.architecture, card.max_model_len, card.trained_len) == ("llama", 1024, 8192)
    assert card.format == "safetensors bfloat16"
    assert card.cache_dtype == "f16"
    assert card.chat_template is not None
    assert "<|im_start|>" in card.chat_template
    for start in ("rope: no scaling", "cache: 4096 tokens as f16", "kernels: "):
        assert any(note.startswith(start) for note in card.notes), start
    assert backend.kv.usage().capacity % PAGE == 0


def test_a_model_is_called_by_its_folder_or_by_its_name_on_the_hub() -> None:
    assert model_id(Path("/models/SmolLM2-135M")) == "SmolLM2-135M"
    assert model_id(Path("/cache/models--acme--tiny-chat/snapshots/0a1b2c")) == "acme/tiny-chat"
    assert model_id(Path()) == Path.cwd().name


def test_progress_goes_up_to_one() -> None:
    seen: list[float] = []
    settings = ModelSettings(max_model_len=64, cache=CacheSettings(tokens=64, dtype="q4"))
    HFBackend(smollm2_bf16(), settings, seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_step_that_fails_says_so_and_leaves_the_sequences_as_they_were(
    backend: HFBackend, text_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = lone_logits(backend, text_ids[:12])
    backend.kv.open(1, text_ids[:12], "fails")
    assert backend.kv.reserve(1, 12)
    backend.forward([Chunk(1, text_ids[:8], 0, "none")])
    backend.kv.commit(1, 0, text_ids[:8])
    with pytest.raises(BackendError, match="invalid token"):
        backend.forward([Chunk(1, [backend.tokenizer.vocab_size], 8, "last")])
    with monkeypatch.context() as patch:
        patch.setattr(backend.runner, "tables", _runs_out)
        with pytest.raises(BackendError, match=r"step of 4 tokens: out of memory$"):
            backend.forward([Chunk(1, text_ids[8:12], 8, "last")])
    rest = backend.forward([Chunk(1, text_ids[8:12], 8, "last")])
    backend.kv.close(1, keep=False)
    assert error(rest, alone[-1:]) < AS_ALONE


def _runs_out(*args: object) -> None:
    raise torch.OutOfMemoryError("out of memory\nwith a second line")
