"""`plan` refuses the GGUF files that `serve` refuses, for the same reason in one line, before any weights are read."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkout import ADAPTERS
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from gguf_files import Change, write_model

from tightrope.backends.detect import outline
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.plan import least_options
from tightrope.backends.gguf.trial import try_load, try_vocabulary
from tightrope.backends.settings import CacheSettings, ModelSettings

Keys = Callable[[GGUFWriter], None]


def settings_for(path: Path) -> ModelSettings:
    return ModelSettings(model=str(path), step_tokens=16, max_num_seqs=1, cache=CacheSettings(tokens=256))


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


def without(name: str) -> Change:
    return lambda tensor, values: None if tensor == name else values


def reshaped(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensor, values: np.ascontiguousarray(change(values)) if tensor == name else values


def put(key: str, value: object, kind: GGUFValueType, element: GGUFValueType | None = None) -> Keys:
    return lambda writer: writer.kv_data[0].update({key: GGUFValue(value, kind, element)})


def drop(key: str) -> Keys:
    return lambda writer: writer.kv_data[0].pop(key) and None


BROKEN_TENSORS: dict[str, tuple[Change, str]] = {
    "no embeddings": (without("token_embd.weight"), "tensor 'token_embd.weight' not found"),
    "no last norm": (without("output_norm.weight"), "tensor 'output_norm.weight' not found"),
    "no queries": (without("blk.0.attn_q.weight"), "tensor 'blk.0.attn_q.weight' not found"),
    "no last linear": (without("blk.1.ffn_down.weight"), "tensor 'blk.1.ffn_down.weight' not found"),
    "half a norm": (
        reshaped("blk.1.ffn_norm.weight", lambda w: w[: len(w) // 2]),
        "'blk.1.ffn_norm.weight' has wrong shape",
    ),
    "a turned linear": (reshaped("blk.0.ffn_up.weight", np.transpose), "'blk.0.ffn_up.weight' has wrong shape"),
    "keys of more heads": (
        reshaped("blk.0.attn_k.weight", lambda w: np.tile(w, (2, 1))),
        "'blk.0.attn_k.weight' has wrong shape",
    ),
    "a row too few": (reshaped("token_embd.weight", lambda w: w[:-1]), "'token_embd.weight' has wrong shape"),
}
U32, F32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.ARRAY
BROKEN_KEYS: dict[str, tuple[Keys, str]] = {
    "no epsilon": (drop("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
    "an epsilon below zero": (put("llama.attention.layer_norm_rms_epsilon", -1e-5, F32), "more than 0 and at most 1"),
    "an epsilon of NaN": (
        put("llama.attention.layer_norm_rms_epsilon", float("nan"), F32),
        "'llama.attention.layer_norm_rms_epsilon' is nan",
    ),
    "an infinite base": (put("llama.rope.freq_base", float("inf"), F32), "'llama.rope.freq_base' is inf"),
    "a base of zero": (put("llama.rope.freq_base", 0.0, F32), "llama.rope.freq_base is 0.0; it must be more than 1"),
    "a factor below zero": (put("llama.rope.scaling.factor", -2.0, F32), "rope.scaling.factor is -2.0"),
    "more layers than tensors": (put("llama.block_count", 3, U32), "tensor 'blk.2.attn_norm.weight' not found"),
    "layers without end": (
        put("llama.block_count", 513, U32),
        "llama.block_count is 513; it must be a number from 1 to 512",
    ),
    "experts and none of them used": (
        put("llama.expert_count", 4, U32),
        "llama.expert_used_count is 0; with 4 experts it must be a number from 1 to 4",
    ),
    "experts used that are not there": (put("llama.expert_used_count", 2, U32), "is 2; there are no experts"),
    "experts without end": (
        put("llama.expert_count", 513, U32),
        "llama.expert_count is 513; it must be a number from 0 to 512",
    ),
    "another architecture": (put("general.architecture", "abacus", STRING), "abacus"),
    "no kind of vocabulary": (drop("tokenizer.ggml.model"), "tokenizer.ggml.model"),
    "no merges": (drop("tokenizer.ggml.merges"), "cannot find tokenizer merges"),
    "no vocabulary": (drop("tokenizer.ggml.tokens"), "it holds no vocabulary"),
    "a pre-tokenizer that nobody knows": (
        put("tokenizer.ggml.pre", "abacus", STRING),
        "unknown pre-tokenizer type: 'abacus'",
    ),
    "an image half": (put("general.type", "mmproj", STRING), "the image half of a model (mmproj)"),
    "an image half by its architecture": (
        put("general.architecture", "clip", STRING),
        "the image half of a model (mmproj)",
    ),
    "an adapter": (put("general.type", "adapter", STRING), "a LoRA adapter, no model: name it with --lora"),
    "a model that makes vectors": (
        put("llama.pooling_type", 3, U32),
        "it makes vectors of texts (llama.pooling_type is 3, last)",
    ),
}


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


def test_tensors_that_an_architecture_does_not_have_are_named(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        for i in range(6):
            writer.add_tensor(f"blk.0.lens_{i}.weight", np.ones(8, np.float32))

    planned, served = refusals(write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", keys=add))
    assert planned == served
    assert "its architecture has no 'blk.0.lens_0.weight', 'blk.0.lens_1.weight', " in planned
    assert planned.endswith("'blk.0.lens_3.weight' and 2 more")


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
