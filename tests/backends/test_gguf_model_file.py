"""`plan` refuses the GGUF files that `serve` refuses, for the same reason in one line, before any weights are read."""

import ctypes
import struct
from pathlib import Path

import pytest
from broken_gguf import BROKEN_KEYS, BROKEN_TENSORS, U32, drop, put, without
from checkout import ADAPTERS
from gguf import GGUFWriter
from gguf_files import write_model

from tightrope.backends.detect import outline
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.plan import least_options
from tightrope.backends.gguf.trial import try_load, try_vocabulary
from tightrope.backends.settings import CacheSettings, ModelSettings


def settings_for(path: Path) -> ModelSettings:
    cache = CacheSettings(tokens=256)
    return ModelSettings(model=str(path), gguf_engine="llama.cpp", step_tokens=16, max_num_seqs=1, cache=cache)


def refusals(path: Path) -> tuple[str, str]:
    """What `plan` and `serve` say about a file that neither takes, each in one line."""
    with pytest.raises(BackendError) as planned:
        outline(settings_for(path), None)
    with pytest.raises(BackendError) as served:
        GGUFBackend(path, settings_for(path), lambda _: None)
    lines = str(planned.value), str(served.value)
    for line in lines:
        assert line.startswith(f"{path}: ")
        assert "\n" not in line
    return lines


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_plan_as_by_serve(name: str, tmp_path: Path) -> None:
    change, reason = BROKEN_TENSORS[name]
    planned, served = refusals(write_model(ADAPTERS / "llama-untied-bf16", tmp_path / "m.gguf", change=change))
    assert planned == served
    assert reason in planned


@pytest.mark.parametrize("name", BROKEN_KEYS)
def test_keys_that_do_not_fit_are_refused_by_plan_as_by_serve(name: str, tmp_path: Path) -> None:
    keys, reason = BROKEN_KEYS[name]
    planned, served = refusals(write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", keys=keys))
    assert planned == served
    assert reason in planned


def test_a_model_that_is_whole_is_planned_with_what_serve_notes(tmp_path: Path) -> None:
    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf")
    planned = outline(settings_for(path), None).chosen
    backend = GGUFBackend(path, settings_for(path), lambda _: None)
    backend.close()
    assert planned is not None
    assert planned.notes[1] == backend.card.notes[0]  # The first line tells which engine runs.
    assert not any("llama.cpp" in note or "vocabulary" in note for note in backend.card.notes)


def test_a_model_that_is_too_large_and_broken_is_refused_as_broken(tmp_path: Path) -> None:
    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", change=without("output_norm.weight"))
    with pytest.raises(BackendError, match=r"'output_norm\.weight' not found"):
        outline(settings_for(path), 1 << 20)


def test_a_file_over_which_llama_cpp_ends_the_process_is_refused_in_one_line(tmp_path: Path) -> None:
    """The header's checks would find this vocabulary; the trial alone shows what happens with what they don't know."""
    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf")
    content = path.read_bytes()
    text = struct.pack("<Q", 1) + b"b"
    assert text in content
    path.write_bytes(content.replace(text, struct.pack("<Q", 1) + b"a", 1))
    for attempt in (lambda: try_load(path, least_options()), lambda: try_vocabulary(path)):
        with pytest.raises(BackendError, match=r"m\.gguf: llama\.cpp ends over it: GGML_ASSERT\(.*\) failed$"):
            attempt()


def test_no_debugger_is_run_over_a_process_that_llama_cpp_ends() -> None:
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    assert getenv(b"GGML_NO_BACKTRACE") == b"1"


def noted(path: Path) -> str:
    """All that is said at the start about a file that is served, and `plan` says the same."""
    backend = GGUFBackend(path, settings_for(path), lambda _: None)
    backend.close()
    planned = outline(settings_for(path), None).chosen
    assert planned is not None
    odd = backend.card.notes[3:]  # after the lines on RoPE, cache and what is moved in it
    assert planned.notes[4:] == odd  # and the engine
    assert all("\n" not in note for note in odd)
    return "\n".join(odd)


def test_what_is_odd_about_a_vocabulary_is_said_at_the_start(tmp_path: Path) -> None:
    for keys, words in (
        (drop("tokenizer.ggml.pre"), "the file lacks tokenizer.ggml.pre, so texts may be cut into other tokens"),
        (drop("tokenizer.ggml.eos_token_id"), "the file names no end token (tokenizer.ggml.eos_token_id)"),
        (put("tokenizer.ggml.eos_token_id", 9999, U32), "bad special token: 'tokenizer.ggml.eos_token_id' = 9999"),
    ):
        assert words in noted(write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", keys=keys))


def test_lines_of_one_kind_are_said_once(tmp_path: Path) -> None:
    def as_text(writer: GGUFWriter) -> None:
        texts = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        texts[3:6] = ["<|eot_id|>", "<end_of_turn>", "<|end|>"]  # ordinary tokens, by their type

    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", keys=as_text)
    said = noted(path)
    assert said.count("was not control-type") == 1
    assert "; 2 more lines are like this one" in said
