"""Both engines on the real SmolLM2: a chat goes on from disk and memory as if it had stayed in the cache."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from gguf_models import gemma
from hf_models import gemma3_bf16, smollm2_bf16
from recurrent_gguf import write_lfm2, write_mamba

from tightrope.backends.detect import open_backend
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.sessions import opening
from tightrope.backends.sessions.store import write_rest
from tightrope.backends.settings import CacheSettings, ModelSettings, RopeSettings

CHAT = [(i * i // 7 + i) % 40_000 + 100 for i in range(180)]
OTHER = [token + 1 for token in CHAT]
MODELS: dict[str, Callable[[], str | None]] = {"torch": lambda: str(smollm2_bf16()), "llama.cpp": lambda: None}
SLIDING: dict[str, Callable[[], Path]] = {"torch": gemma3_bf16, "llama.cpp": gemma}
STATES = {"recurrent": write_mamba, "hybrid": write_lfm2}


def load(
    engine: str,
    *,
    model: Path | None = None,
    window: int = 256,
    tokens: int = 512,
    rope: RopeSettings | None = None,
    **cache: str | int | None,
) -> Backend:
    settings = ModelSettings(
        model=MODELS[engine]() if model is None else str(model),
        gguf_engine="llama.cpp",
        max_model_len=window,
        max_num_seqs=2,
        cache=CacheSettings.model_validate({"tokens": tokens, **cache}),
        rope=rope or RopeSettings(),
    )
    return open_backend(settings, lambda _: None)


def turn(
    backend: Backend, token_ids: list[int], namespace: str = "", answer: Sequence[int] = ()
) -> tuple[int, torch.Tensor]:
    """Run a prompt and an answer to it; returns how many of its tokens were found, and the logits behind it."""
    found = backend.kv.open(1, token_ids, namespace).num_tokens
    assert backend.kv.reserve(1, len(token_ids) - found)
    logits, most = torch.empty(0), backend.capabilities.max_step_tokens
    for start in range(found, len(token_ids), most):
        part = token_ids[start : start + most]
        logits = backend.forward([Chunk(1, part, start, "last")]).clone()
        backend.kv.commit(1, start, part)
    for place, token_id in enumerate(answer, len(token_ids)):
        assert backend.kv.reserve(1, 1)
        backend.forward([Chunk(1, [token_id], place, "last")])
        backend.kv.commit(1, place, [token_id])
    backend.kv.close(1, keep=True)
    backend.kv.check_integrity()
    return found, logits


@pytest.mark.parametrize("engine", MODELS)
def test_the_next_process_goes_on_with_the_very_numbers(engine: str, tmp_path: Path) -> None:
    first = load(engine, session_dir=str(tmp_path / "chats"))
    turn(first, CHAT)
    write_rest(60)
    shutil.copytree(tmp_path / "chats", tmp_path / "then")
    found, stayed = turn(first, [*CHAT, 7, 8])
    assert found == len(CHAT)
    first.close()

    after = load(engine, session_dir=str(tmp_path / "then"))
    assert any(str(tmp_path / "then") in note for note in after.card.notes)
    assert turn(after, [*CHAT, 7, 8], "another key")[0] == 0
    found, came_back = turn(after, [*CHAT, 7, 8])
    assert found == len(CHAT)
    assert torch.equal(stayed, came_back)
    assert turn(after, [*CHAT[:80], 7])[0] == 80
    after.close()


@pytest.mark.parametrize("write", STATES.values(), ids=STATES)
def test_a_model_that_holds_a_state_goes_on_from_the_end_of_a_chat_or_reads_it_anew(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "read_seconds", lambda folder: 0.0)  # So small a model is faster than a disk.
    model, chat = write(tmp_path / "model.gguf"), [token % 200 + 20 for token in CHAT]
    first = load("llama.cpp", model=model, session_dir=str(tmp_path / "chats"))
    turn(first, chat)
    write_rest(60)
    shutil.copytree(tmp_path / "chats", tmp_path / "then")
    found, stayed = turn(first, [*chat, 7, 8])
    assert found == len(chat)
    first.close()

    after = load("llama.cpp", model=model, session_dir=str(tmp_path / "then"))
    found, came_back = turn(after, [*chat, 7, 8])
    assert found == len(chat)
    assert torch.equal(stayed, came_back)
    after.close()
    again = load("llama.cpp", model=model, session_dir=str(tmp_path / "then"))
    assert turn(again, [*chat[:80], 7])[0] == 0
    again.close()


def goes_back(model: Path, chat: list[int], window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another answer is asked for to a chat's prompt, in the process that knows it and in the next one."""
    monkeypatch.setattr(opening, "read_seconds", lambda folder: 0.0)  # So small a model is faster than a disk.
    prompt, answer = chat[:-20], chat[-20:]
    first = load("llama.cpp", model=model, window=window, tokens=2 * window, session_dir=str(tmp_path / "chats"))
    for length in (len(prompt) - 50, len(prompt)):  # Two turns.
        turn(first, prompt[:length], answer=answer)
    write_rest(60)
    shutil.copytree(tmp_path / "chats", tmp_path / "then")
    assert isinstance(first.kv, SharedKVCache)
    first.kv._swap_out_idle(0)  # What comes back lies in other cells, whose order decides how sums are rounded.
    found, stayed = turn(first, prompt)
    assert found == len(prompt) - 1
    first.close()
    after = load("llama.cpp", model=model, window=window, tokens=2 * window, session_dir=str(tmp_path / "then"))
    found, came_back = turn(after, prompt)
    assert found == len(prompt) - 1
    assert torch.equal(stayed, came_back)
    assert turn(after, [*prompt[:-1], 7], "another key")[0] == 0
    after.close()


@pytest.mark.parametrize("write", STATES.values(), ids=STATES)
def test_a_model_that_holds_a_state_goes_back_to_the_end_of_its_prompt_in_the_next_process(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_back(write(tmp_path / "model.gguf"), [token % 200 + 20 for token in CHAT], 256, tmp_path, monkeypatch)


@pytest.mark.slow
def test_sliding_layers_go_back_to_the_end_of_their_prompt_in_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [(i * i // 7 + i) % 200_000 + 300 for i in range(720)]
    goes_back(gemma(), chat, 1024, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SLIDING)
def test_sliding_layers_go_on_from_their_window(engine: str, tmp_path: Path) -> None:
    chat = [(i * i // 7 + i) % 200_000 + 300 for i in range(700)]
    first = load(engine, model=SLIDING[engine](), window=1024, tokens=1024, session_dir=str(tmp_path / "chats"))
    turn(first, chat)
    write_rest(60)
    shutil.copytree(tmp_path / "chats", tmp_path / "then")
    found, stayed = turn(first, [*chat, 7, 8])
    assert found == len(chat)
    first.close()

    after = load(engine, model=SLIDING[engine](), window=1024, tokens=1024, session_dir=str(tmp_path / "then"))
    found, came_back = turn(after, [*chat, 7, 8])
    assert found == len(chat)
    assert torch.equal(stayed, came_back)
    after.close()


@pytest.mark.parametrize("engine", MODELS)
def test_two_chats_that_alternate_on_a_cache_for_one_are_read_once(engine: str) -> None:
    backend = load(engine, tokens=256, host_mib=64)
    texts = [list(CHAT), list(OTHER)]
    for text in texts:
        assert turn(backend, text)[0] == 0
    for text in texts:
        text += [7, 8, 9]
        assert turn(backend, text)[0] == len(CHAT)
    backend.close()


@pytest.mark.parametrize("engine", MODELS)
def test_without_memory_beside_the_cache_what_has_left_it_is_gone(engine: str) -> None:
    backend = load(engine, tokens=256, host_mib=0)
    turn(backend, CHAT)
    turn(backend, OTHER)
    assert turn(backend, [*CHAT, 7])[0] < len(CHAT)
    backend.close()


@pytest.mark.parametrize("engine", MODELS)
def test_under_another_rotation_nothing_is_found(engine: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "chats")
    first = load(engine, session_dir=folder)
    turn(first, CHAT)
    first.close()
    changed = load(engine, session_dir=folder, rope=RopeSettings(kind="linear", factor=2.0))
    assert turn(changed, [*CHAT, 7])[0] == 0
    changed.close()


@pytest.mark.parametrize("engine", MODELS)
def test_a_folder_that_is_none_of_chats_is_refused_before_the_model_is_loaded(engine: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BackendError, match=r"^--session-dir: .*no folder of chats") as error:
        load(engine, session_dir=str(tmp_path))
    assert "\n" not in str(error.value)
