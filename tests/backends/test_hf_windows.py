"""Layers with a sliding window keep their window and no more, and what a model writes doesn't tell.

SmolLM2's weights as a Mistral, whose layers all slide, and Gemma 3, of whose layers every sixth sees everything.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
from engine_runs import request, run
from hf_models import gemma3_bf16, smollm2_bf16
from transformers import AutoModelForCausalLM, PreTrainedModel

from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run.calibrate import TEXT
from tightrope.backends.protocol import Chunk
from tightrope.backends.reuse import Reuse
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.core import EngineCore
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import TokenPrompt

WINDOW = 48
NUM_TOKENS = 48
AS_ALONE = 3e-4  # of the logits' size: sums in another order, and cached numbers that fall to the other side
AS_FLOAT32 = 1e-3  # keys and values of 11 bits against 24

_fresh_names = map(str, count())


def load(folder: Path, *, tokens: int, max_num_seqs: int, step_tokens: int = 32) -> HFBackend:
    settings = ModelSettings(
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        step_tokens=step_tokens,
        cache=CacheSettings(tokens=tokens, dtype="f16"),
    )
    return HFBackend(folder, settings, lambda _: None)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    for file in smollm2_bf16().iterdir():
        (folder / file.name).hardlink_to(file)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="module")
def backend(mistral: Path) -> Iterator[HFBackend]:
    """With fewer pages for its windows than it has for its tokens."""
    loaded = load(mistral, tokens=2048, max_num_seqs=3)
    assert all(cache.is_windowed for cache in loaded.runner.caches)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def prompts(backend: HFBackend) -> list[list[int]]:
    """Parts of a text, all of them much longer than the window; what is answered to them has no near ties."""
    token_ids = backend.tokenizer.encode(TEXT, parse_special=False, is_start=True)
    return [token_ids[90:320], token_ids[135:365], token_ids[195:345]]


@pytest.fixture(scope="module")
def alone(mistral: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What the model answers to each prompt with pages for all tokens in all layers, run in one step."""
    roomy = load(mistral, tokens=512, max_num_seqs=16, step_tokens=256)
    assert not any(cache.is_windowed for cache in roomy.runner.caches)
    answers = [written(EngineCore(roomy, LimitSettings()), [prompt])[0] for prompt in prompts]
    roomy.close()
    return answers


def written(core: EngineCore, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The greedy answers to all prompts side by side."""
    requests = [
        request(next(_fresh_names), TokenPrompt(tuple(prompt)), max_tokens=NUM_TOKENS, ignore_eos=True)
        for prompt in prompts
    ]
    answers = run(core, *requests).values()
    return [[token.token_id for delta in deltas for token in delta.tokens] for deltas in answers]


def test_chunked_and_batched_answers_are_those_of_a_lone_run_and_so_are_repeated_ones(
    backend: HFBackend, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    core = EngineCore(backend, LimitSettings())
    assert written(core, prompts) == alone

    before = core.stats().cached_tokens
    assert written(core, prompts) == alone
    assert core.stats().cached_tokens - before == sum(len(prompt) - 1 for prompt in prompts)


def test_a_chat_goes_on_from_its_last_window(
    backend: HFBackend, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    core = EngineCore(backend, LimitSettings())
    turn = [*prompts[0], *alone[0][:5]]
    written(core, [prompts[0]])
    before = core.stats().cached_tokens
    assert written(core, [turn])[0][: NUM_TOKENS - 5] == alone[0][5:]
    assert core.stats().cached_tokens - before == len(turn) - 1


def test_a_prompt_whose_window_is_gone_is_computed_again(
    backend: HFBackend, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    core = EngineCore(backend, LimitSettings())
    written(core, [prompts[0]])
    written(core, [prompts[2][::-1], prompts[1][::-1], prompts[0][::-1]])
    before = core.stats().cached_tokens
    assert written(core, [prompts[0]]) == alone[:1]
    assert core.stats().cached_tokens == before


def test_preempted_answers_are_those_of_a_lone_run(
    mistral: Path, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    tight = load(mistral, tokens=752, max_num_seqs=3, step_tokens=64)
    assert all(cache.is_windowed for cache in tight.runner.caches)
    core = EngineCore(tight, LimitSettings(busy_step_ms=60_000.0))  # A slow machine is to run them side by side, too.
    assert written(core, prompts) == alone
    assert core.stats().preemptions > 0
    tight.close()


def test_the_cache_takes_the_bytes_that_were_planned_for_windows(backend: HFBackend) -> None:
    tensors = [t for c in backend.runner.caches for t in (c.key_codes, c.value_codes)]
    layer_bytes = 2 * 2 * 3 * 64  # of a token: keys and values of three heads in float16
    (note,) = [note for note in backend.card.notes if "layers see" in note and "keep" in note]
    kept = int(note.split()[-1])

    assert note == f"cache: 30 of 30 layers see {WINDOW} tokens, and keep {kept}"
    assert sum(t.nbytes for t in tensors) == 30 * layer_bytes * kept < 2048 * backend.card.cache_token_bytes / 3


def test_gemma_3_beyond_its_window_has_the_logits_of_transformers_with_a_fifth_of_the_pages() -> None:
    backend = load(gemma3_bf16(), tokens=16_384, max_num_seqs=1, step_tokens=128)
    sizes = {len(cache.key_codes) for cache in backend.runner.caches}
    assert max(sizes) == 1024 > 5 * min(sizes)
    token_ids = [2, *backend.tokenizer.encode(TEXT, parse_special=False, is_start=True)]
    token_ids += token_ids[:300]

    rows = []
    backend.kv.open(1, token_ids, "")
    for start in range(0, len(token_ids), 128):
        part = token_ids[start : start + 128]
        assert backend.kv.reserve(1, len(part))
        rows.append(backend.forward([Chunk(1, part, start, "last")])[-1])
        backend.kv.commit(1, start, part)
    backend.kv.close(1, keep=True)
    assert backend.kv.open(2, token_ids, "") == Reuse.prefix(len(token_ids) - 1)
    assert backend.kv.reserve(2, 1)
    again = backend.forward([Chunk(2, token_ids[-1:], len(token_ids) - 1, "last")])[0]

    theirs = AutoModelForCausalLM.from_pretrained(gemma3_bf16(), dtype=torch.float32)
    assert isinstance(theirs, PreTrainedModel)
    ends = [min(start + 128, len(token_ids)) - 1 for start in range(0, len(token_ids), 128)]
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids]), logits_to_keep=torch.tensor(ends)).logits[0]
    for row, wanted in zip([*rows, again], [*expected, expected[-1]], strict=True):
        assert (row - wanted).norm() < AS_FLOAT32 * wanted.norm()
    backend.kv.check_integrity()
    backend.close()
