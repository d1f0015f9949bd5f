"""The GGUF backend on the real SmolLM2: however the work is cut up and shared, the logits are those of a lone run."""

import random
from collections.abc import Iterator

import pytest
import torch
from gguf_models import gemma, greedy, lone_logits
from llama_cpp import llama_cpp as ll

from tightrope.backends import sharing
from tightrope.backends.errors import BackendError, OutOfMemory
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Chunk
from tightrope.backends.reuse import Reuse
from tightrope.backends.settings import CacheSettings, KVCacheDtype, ModelSettings, RopeSettings
from tightrope.backends.sharing import Counters, Threads

# Mean Kullback-Leibler divergence, in nats, between two ways to compute the same. Batches of different shape run in
# different kernels, which round activations to 8 bits and values to 16; SmolLM2's logits move by up to 1 for it, its
# distributions by 0.002. A wrong token, place or neighbour costs more than 0.1.
MOST_DIVERGENCE = 0.01

PROMPT = "<|im_start|>user\nName three rivers of Europe and say where each one ends.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def backend() -> Iterator[GGUFBackend]:
    settings = ModelSettings(
        max_model_len=1024, max_num_seqs=8, step_tokens=256, cache=CacheSettings(tokens=2048, dtype="f16")
    )
    loaded = GGUFBackend(bundled_model(), settings, lambda _: None)
    yield loaded
    loaded.kv.check_integrity()
    loaded.close()


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Both [n, V]: the distributions are the same up to rounding."""
    assert logits.shape == expected.shape
    expected, logits = expected.log_softmax(-1), logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - logits)).sum(-1)
    assert divergence.mean() < MOST_DIVERGENCE, divergence


@pytest.fixture(scope="module")
def text_ids(backend: GGUFBackend) -> list[int]:
    """160 tokens of sensible text."""
    words = "The Danube rises in the Black Forest and flows through ten countries before it meets the Black Sea. "
    return backend.tokenizer.encode(words * 12, parse_special=False, is_start=True)[:160]


def test_steps_have_fewer_threads_while_others_keep_the_machine_busy(
    backend: GGUFBackend, text_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # For nine of ten seconds others ran and we waited; then the machine idled.
    counted = iter([Counters(0, 0, 0, 0), Counters(1, 9, 0, 9), Counters(1, 9, 100, 9)])
    monkeypatch.setattr(sharing, "read_counters", lambda: next(counted))
    monkeypatch.setattr(sharing, "LOOK_EVERY_S", 0.0)
    context = backend._context
    used: list[int] = []

    def give(count: int) -> None:
        context.set_threads(count)
        used.append(ll.llama_n_threads(context.pointer))

    monkeypatch.setattr(context, "_threads", Threads(2, give))

    fewer, all_again = (lone_logits(backend, text_ids[:20]) for _ in range(2))

    assert used == [1, 2]
    assert_same(fewer, all_again)


def test_a_prompt_run_in_pieces_gives_the_logits_of_a_lone_run(backend: GGUFBackend, text_ids: list[int]) -> None:
    alone = lone_logits(backend, text_ids)
    backend.kv.open(1, text_ids, "pieces")
    assert backend.kv.reserve(1, len(text_ids))
    rows = []
    for start, end in ((0, 1), (1, 40), (40, 41), (41, 160)):
        rows.append(backend.forward([Chunk(1, text_ids[start:end], start, "all")]).clone())
        backend.kv.commit(1, start, text_ids[start:end])
    backend.kv.close(1, keep=False)
    assert_same(torch.cat(rows), alone)


def test_a_step_for_which_llama_finds_no_memory_is_told_as_that_and_the_next_one_runs(
    backend: GGUFBackend, text_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = lone_logits(backend, text_ids[:20])
    backend.kv.open(1, text_ids[:20], "tight")
    assert backend.kv.reserve(1, 20)
    monkeypatch.setattr(ll, "llama_decode", lambda context, batch: -2)
    with pytest.raises(OutOfMemory, match=r"^out of memory in a step of 20 tokens: "):
        backend.forward([Chunk(1, text_ids[:20], 0, "all")])
    monkeypatch.undo()

    logits = backend.forward([Chunk(1, text_ids[:20], 0, "all")]).clone()

    backend.kv.commit(1, 0, text_ids[:20])
    backend.kv.close(1, keep=False)
    assert_same(logits, alone)


def test_sequences_in_one_step_do_not_disturb_each_other(backend: GGUFBackend, text_ids: list[int]) -> None:
    parts = [text_ids[:50], text_ids[50:51], text_ids[60:95]]
    alone = [lone_logits(backend, part) for part in parts]
    for seq_id, part in enumerate(parts):
        backend.kv.open(seq_id, part, f"together {seq_id}")
        assert backend.kv.reserve(seq_id, len(part))
    chunks = [
        Chunk(0, parts[0], 0, "last"),
        Chunk(1, parts[1], 0, "all"),
        Chunk(2, parts[2][:10], 0, "none"),
    ]
    logits = backend.forward(chunks).clone()
    assert logits.shape == (2, backend.tokenizer.vocab_size)
    assert_same(logits, torch.stack([alone[0][-1], alone[1][0]]))
    backend.kv.commit(2, 0, parts[2][:10])
    rest = backend.forward([Chunk(2, parts[2][10:], 10, "last")])
    assert_same(rest, alone[2][-1:])
    for seq_id in range(3):
        backend.kv.close(seq_id, keep=False)


def test_a_reused_prefix_gives_the_logits_of_a_lone_run(backend: GGUFBackend, text_ids: list[int]) -> None:
    branch = [*text_ids[:90], *reversed(text_ids[:30])]
    alone = lone_logits(backend, branch)
    greedy(backend, 1, text_ids, 1, "reuse")
    backend.kv.close(1, keep=True)
    assert backend.kv.open(2, branch, "reuse") == Reuse.prefix(90)
    assert backend.kv.reserve(2, 30)
    logits = backend.forward([Chunk(2, branch[90:], 90, "all")])
    assert_same(logits, alone[90:])
    backend.kv.close(2, keep=False)


def test_a_chat_goes_on_in_its_own_cells_with_the_bits_of_one_that_was_laid_out_anew(
    backend: GGUFBackend, text_ids: list[int]
) -> None:
    def second_turn(seq_id: int, *, is_parted: bool) -> torch.Tensor:
        """The logits behind a prompt whose beginning ran before, and then something else, if `is_parted`."""
        others = [(seq_id + 1, text_ids[80:])] if is_parted else []
        for number, token_ids in [(seq_id, text_ids[:70]), *others]:
            backend.kv.open(number, token_ids, f"chat {seq_id}", reproducible=True)
            run(backend, number, token_ids, 0)
            backend.kv.close(number, keep=True)
        found = backend.kv.open(seq_id + 2, text_ids[:100], f"chat {seq_id}", reproducible=True)
        assert found == Reuse.prefix(70)
        logits = run(backend, seq_id + 2, text_ids[:100], 70)
        backend.kv.close(seq_id + 2, keep=False)
        return logits

    assert torch.equal(second_turn(700, is_parted=False), second_turn(710, is_parted=True))


def run(backend: GGUFBackend, seq_id: int, token_ids: list[int], start: int) -> torch.Tensor:
    """The last logits of an open sequence that holds the first `start` of its tokens."""
    assert backend.kv.reserve(seq_id, len(token_ids) - start)
    logits = backend.forward([Chunk(seq_id, token_ids[start:], start, "last")]).clone()
    backend.kv.commit(seq_id, start, token_ids[start:])
    return logits


def test_a_sequence_that_lost_its_place_continues_as_if_it_had_not(backend: GGUFBackend) -> None:
    prompt = backend.tokenizer.encode(PROMPT, parse_special=True, is_start=True)
    said = prompt + greedy(backend, 1, prompt, 24, "preempted")
    backend.kv.close(1, keep=True)
    hog = [random.Random(1).randrange(1000, 9000) for _ in range(2030)]
    backend.kv.open(3, hog, "hog")
    assert backend.kv.reserve(3, len(hog))  # needs nearly all room that was kept
    backend.kv.close(3, keep=False)
    found = backend.kv.open(4, said, "preempted").num_tokens
    assert len(prompt) < found < len(said)  # it came back from where it was swapped out
    assert backend.kv.reserve(4, len(said) - found)
    logits = backend.forward([Chunk(4, said[found:], found, "all")]).clone()
    backend.kv.close(4, keep=False)
    assert_same(logits, lone_logits(backend, said)[found:])


def test_streams_side_by_side_see_what_each_would_see_alone(backend: GGUFBackend, text_ids: list[int]) -> None:
    """Four prompts of different length, then sixteen steps of one token each."""
    streams = [text_ids[i : i + 20 + 7 * i + 16] for i in range(4)]
    alone = [lone_logits(backend, stream)[-17:] for stream in streams]
    rows: list[list[torch.Tensor]] = [[] for _ in streams]
    starts = [0] * len(streams)
    for i, stream in enumerate(streams):
        backend.kv.open(i, stream, f"beside {i}")
    for step in range(17):
        ends = [len(stream) - 16 + step for stream in streams]
        chunks = [Chunk(i, stream[starts[i] : ends[i]], starts[i], "last") for i, stream in enumerate(streams)]
        assert all(backend.kv.reserve(chunk.seq_id, len(chunk.token_ids)) for chunk in chunks)
        for i, row in enumerate(backend.forward(chunks).clone()):
            backend.kv.commit(i, starts[i], chunks[i].token_ids)
            rows[i].append(row)
        starts = ends
    for i in range(len(streams)):
        backend.kv.close(i, keep=False)
        assert_same(torch.stack(rows[i]), alone[i])


def test_more_rows_than_one_native_call_yields_come_back_together(backend: GGUFBackend, text_ids: list[int]) -> None:
    """160 rows and the outputs of two other sequences, of 128 that a call may yield."""
    alone = lone_logits(backend, text_ids[:20])
    for seq_id, part in enumerate((text_ids[:20], text_ids, text_ids[:20])):
        backend.kv.open(seq_id, part, f"rows {seq_id}")
        assert backend.kv.reserve(seq_id, len(part))
    logits = backend.forward(
        [Chunk(0, text_ids[:20], 0, "last"), Chunk(1, text_ids, 0, "all"), Chunk(2, text_ids[:20], 0, "last")]
    )
    assert logits.shape == (162, backend.tokenizer.vocab_size)
    assert_same(logits[:1], alone[-1:])
    assert_same(logits[1:21], alone)
    assert_same(logits[-1:], alone[-1:])
    for seq_id in range(3):
        backend.kv.close(seq_id, keep=False)


def test_a_step_that_wants_no_logits_returns_none(backend: GGUFBackend, text_ids: list[int]) -> None:
    backend.kv.open(1, text_ids[:5], "none")
    assert backend.kv.reserve(1, 5)
    assert backend.forward([Chunk(1, text_ids[:5], 0, "none")]).shape == (0, backend.tokenizer.vocab_size)
    backend.kv.close(1, keep=False)


def test_a_step_that_fails_says_so_and_leaves_the_sequences_as_they_were(
    backend: GGUFBackend, text_ids: list[int]
) -> None:
    alone = lone_logits(backend, text_ids[:12])
    backend.kv.open(1, text_ids[:12], "fails")
    assert backend.kv.reserve(1, 20)
    backend.forward([Chunk(1, text_ids[:8], 0, "none")])
    backend.kv.commit(1, 0, text_ids[:8])
    with pytest.raises(BackendError, match="invalid token"):
        backend.forward([Chunk(1, [backend.tokenizer.vocab_size], 8, "last")])
    logits = backend.forward([Chunk(1, text_ids[8:12], 8, "all")])
    assert_same(logits, alone[8:])
    backend.kv.close(1, keep=False)


def test_the_card_tells_what_was_loaded(backend: GGUFBackend) -> None:
    card = backend.card
    assert (card.architecture, card.max_model_len, card.trained_len) == ("llama", 1024, 8192)
    assert card.format == "gguf Q4_1, 5.7 bpw"
    assert card.cache_dtype == "f16"
    assert card.chat_template is not None
    assert "<|im_start|>" in card.chat_template
    assert any(note.startswith("cache: 2048 tokens as f16") for note in card.notes)


def test_progress_goes_up_to_one() -> None:
    seen: list[float] = []
    GGUFBackend(bundled_model(), ModelSettings(max_model_len=256, cache=CacheSettings(tokens=256)), seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def rope_logits(rope: RopeSettings, dtype: KVCacheDtype = "f16") -> torch.Tensor:
    """Logits of forty tokens under RoPE settings."""
    settings = ModelSettings(max_model_len=256, cache=CacheSettings(tokens=256, dtype=dtype), rope=rope)
    loaded = GGUFBackend(bundled_model(), settings, lambda _: None)
    logits = lone_logits(loaded, loaded.tokenizer.encode(PROMPT * 2, parse_special=True, is_start=True)[:40])
    loaded.close()
    return logits


def test_rope_settings_reach_the_model() -> None:
    plain = rope_logits(RopeSettings())
    by_base = rope_logits(RopeSettings(theta=100000.0 * 8 ** (64 / 62)))  # what NTK by 8 means for a head of 64
    for kind in ("linear", "ntk", "yarn"):
        scaled = rope_logits(RopeSettings(kind=kind, factor=8.0))
        assert (scaled[20:] - plain[20:]).abs().max() > 1, kind
        if kind != "yarn":  # YaRN also changes the attention's temperature
            assert_same(scaled[:1], plain[:1])  # nothing turns at position 0
        if kind == "ntk":
            torch.testing.assert_close(scaled, by_base, atol=1e-3, rtol=0)
    torch.testing.assert_close(rope_logits(RopeSettings(kind="none")), plain, atol=1e-3, rtol=0)


def test_eight_bit_keys_and_values_stay_close_to_sixteen() -> None:
    assert_same(rope_logits(RopeSettings(), dtype="q8"), rope_logits(RopeSettings()))


def test_a_sliding_window_model_reuses_a_prefix_beyond_its_window() -> None:
    """Gemma 3 looks back 512 tokens in most layers; 700 are run, and 650 of them reused."""
    settings = ModelSettings(
        max_model_len=1024, max_num_seqs=2, step_tokens=256, cache=CacheSettings(tokens=3072, dtype="f16")
    )
    loaded = GGUFBackend(gemma(), settings, lambda _: None)
    sentence = "The quick brown fox jumps over the lazy dog while seven wizards watch. "
    said = [loaded.tokenizer.bos_id or 0, *loaded.tokenizer.encode(sentence * 60, parse_special=False, is_start=True)]
    branch = [*said[:650], *said[10:30]]
    run_in_pieces(loaded, 1, branch, "alone")
    alone = loaded.forward([Chunk(1, said[:1], len(branch), "last")]).clone()
    loaded.kv.close(1, keep=False)
    run_in_pieces(loaded, 2, said[:700], "shared")
    loaded.kv.close(2, keep=True)
    assert run_in_pieces(loaded, 3, branch, "shared") == 650
    again = loaded.forward([Chunk(3, said[:1], len(branch), "last")])
    assert_same(again, alone)
    loaded.kv.close(3, keep=True)
    loaded.kv.check_integrity()
    loaded.close()


def run_in_pieces(loaded: GGUFBackend, seq_id: int, token_ids: list[int], namespace: str) -> int:
    """Open a sequence and run its tokens, leaving room for one more; returns how many were cached."""
    found = loaded.kv.open(seq_id, token_ids, namespace).num_tokens
    for start in range(found, len(token_ids), 256):
        piece = token_ids[start : start + 256]
        assert loaded.kv.reserve(seq_id, len(piece) + 1)
        loaded.forward([Chunk(seq_id, piece, start, "none")])
        loaded.kv.commit(seq_id, start, piece)
    return found
