"""Adapters over GGUF models, through llama.cpp: the logits of the same adapters in the torch engine's format."""

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from checkout import ADAPTERS
from gguf_files import write_adapter, write_model
from real_server import RunningServer, run_server
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightrope.backends.adapters import fingerprint
from tightrope.backends.detect import outline
from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header
from tightrope.backends.files.peft import read_adapter
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.peft_file import Conversion
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings

EXPECTED: Mapping[str, Any] = json.loads((ADAPTERS / "expected.json").read_text("utf-8"))
# Keys and values are kept in float16, and ggml multiplies by them in it; adapters move these logits by about 1.
CLOSE = 1e-2
NUM_LOW_RANK = 2 * 4 * (3 * (128 + 352) + 2 * (128 + 128) + 128 + 64)  # of llama-lora-r4: two layers of rank 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and an adapter as GGUF files."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in ("llama-bf16", "mixtral-bf16", "llama-untied-bf16"):
        write_model(ADAPTERS / name, folder / f"{name}.gguf")
    write_adapter(ADAPTERS / "llama-lora-r4", folder / "lora.gguf", ADAPTERS / "llama-bf16")
    return folder


def open_model(path: Path, **adapters: Path) -> GGUFBackend:
    settings = ModelSettings(
        max_model_len=256,
        max_num_seqs=8,
        threads=1,
        cache=CacheSettings(tokens=1024, dtype="f16"),
        adapters={name: str(place) for name, place in adapters.items()},
        adapter_folder=str(path.parent),
        adapter_memory_mib=1,
    )
    return GGUFBackend(path, settings, lambda _: None)


def last_logits(
    backend: GGUFBackend | HFBackend, ids: list[int], adapter: str | None = None, scale: float = 1.0
) -> Tensor:
    """[V] after a prompt; nothing stays cached."""
    backend.kv.open(0, ids, f"{adapter} {scale}", reuse="nothing")
    assert backend.kv.reserve(0, len(ids))
    logits = backend.forward([Chunk(0, ids, 0, "last", adapter, scale)])[0].clone()
    backend.kv.close(0, keep=False)
    return logits


def assert_expected(logits: Tensor, prompt: Mapping[str, Any]) -> None:
    expected = torch.tensor(prompt["top20_logits"])
    torch.testing.assert_close(logits[prompt["top20_ids"]], expected, atol=CLOSE, rtol=0)


def test_an_adapter_gives_the_logits_of_its_peft_folder_and_the_base_its_own_again(files: Path) -> None:
    expected = EXPECTED["llama-lora-r4"]
    with closing(open_model(files / "llama-bf16.gguf", mine=files / "lora.gguf")) as backend:
        for _ in range(2):
            for prompt in expected["prompts"]:
                assert_expected(last_logits(backend, prompt["ids"], "mine"), prompt)
            for prompt in expected["prompts_without_adapter"]:
                assert_expected(last_logits(backend, prompt["ids"]), prompt)
                assert_expected(last_logits(backend, prompt["ids"], "mine", 0.0), prompt)


def test_an_adapter_is_told_from_others_by_what_its_files_hold(files: Path, tmp_path: Path) -> None:
    same = Path(shutil.copy(files / "lora.gguf", tmp_path / "same.gguf"))
    adapters = {"mine": files / "lora.gguf", "same": same, "folder": ADAPTERS / "llama-lora-r4"}
    with closing(open_model(files / "llama-bf16.gguf", **adapters)) as backend:
        marks = {name: backend.adapters.fingerprint(name) for name in adapters}

    assert marks["mine"] == marks["same"] == fingerprint(same)
    assert marks["folder"] == fingerprint(adapters["folder"]) != marks["mine"]


def write(path: Path, tensors: Mapping[str, np.ndarray], alpha: float | int = 8.0, **strings: str) -> Path:
    """A file with these tensors, [rows, columns], and metadata of an adapter for a llama, or other."""
    named = {"adapter.type": "lora"} | {key.replace("__", "."): value for key, value in strings.items()}
    writer = gguf.GGUFWriter(path, named.pop("architecture", "llama"))
    writer.add_type(named.pop("type", "adapter"))
    for key, value in named.items():
        writer.add_string(key, value)
    if isinstance(alpha, int):
        writer.add_uint32("adapter.lora.alpha", alpha)
    else:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def half(rows: int, columns: int, value: float = 0.01) -> np.ndarray:
    return np.full((rows, columns), value, np.float32)


def pair(name: str, inputs: int = 128, outputs: int = 128, rank: int = 4) -> dict[str, np.ndarray]:
    return {f"{name}.lora_a": half(rank, inputs), f"{name}.lora_b": half(outputs, rank)}


Q = "blk.0.attn_q.weight"


def cut(path: Path) -> None:
    write(path, pair(Q))
    path.write_bytes(path.read_bytes()[:-100])


BAD: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (lambda p: write(p, pair(Q), architecture="qwen2"), "of architecture 'qwen2'; this one is 'llama'"),
    "model": (lambda p: shutil.copy(p.parent / "llama-bf16.gguf", p), r"no adapter: general\.type is None"),
    "kind": (lambda p: write(p, pair(Q), adapter__type="vera"), r"adapter\.type is 'vera'; 'lora' can be served"),
    "alpha": (lambda p: write(p, pair(Q), alpha=8), "must be a number, as float32"),
    "NaN alpha": (lambda p: write(p, pair(Q), alpha=float("nan")), "must be a finite number"),
    "target": (lambda p: write(p, pair("blk.0.attn_w.weight")), "attn_w.weight' is no linear of this model"),
    "layer": (lambda p: write(p, pair("blk.7.attn_q.weight")), "'blk.7.attn_q.weight' is no linear of this model"),
    "embedding": (lambda p: write(p, pair("token_embd.weight", outputs=512)), "is no linear of this model"),
    "inputs": (lambda p: write(p, pair(Q, inputs=96)), "don't fit: an adapter for another base"),
    "outputs": (lambda p: write(p, pair(Q, outputs=96)), "don't fit: an adapter for another base"),
    "ranks": (lambda p: write(p, {**pair(Q), f"{Q}.lora_a": half(5, 128)}), "don't fit: an adapter for another base"),
    "one half": (lambda p: write(p, {f"{Q}.lora_a": half(4, 128)}), "has lora_a alone; an adapter has both halves"),
    "norm": (lambda p: write(p, pair(Q) | {"blk.0.attn_norm.weight": np.ones(128, np.float32)}), "can't be used"),
    "integers": (lambda p: write(p, {n: t.astype(np.int8) for n, t in pair(Q).items()}), "is I8; F32, F16, BF16"),
    "nothing": (lambda p: write(p, {}), "holds no adapter"),
    "NaN": (lambda p: write(p, pair(Q) | {f"{Q}.lora_a": half(4, 128, float("nan"))}), "holds NaN"),
    "huge": (lambda p: write(p, pair(Q, rank=2048)), r"takes 2\.0 MiB, and 1\.0 of the"),
    "truncated": (cut, "truncated"),
    "text": (lambda p: p.write_text("not a file of this kind"), "not a GGUF file"),
}  # fmt: skip


def test_files_that_can_not_be_right_are_refused_in_one_line(files: Path) -> None:
    with closing(open_model(files / "llama-bf16.gguf", mine=files / "lora.gguf")) as backend:
        prompt = EXPECTED["llama-lora-r4"]["prompts"][0]
        for name, (make, reason) in BAD.items():
            path = files / f"bad {name}.gguf"
            make(path)
            with pytest.raises(BackendError, match=reason) as raised:
                backend.adapters.prepare(name, path)()
            assert "\n" not in str(raised.value)
            backend.adapters.remove(name)
        assert_expected(last_logits(backend, prompt["ids"], "mine"), prompt)


def test_an_adapter_that_does_not_fit_its_base_stops_the_start(files: Path) -> None:
    with pytest.raises(BackendError, match=r"lora\.gguf: 'blk\.0\.ffn_.*' is no linear of this model"):
        open_model(files / "mixtral-bf16.gguf", mine=files / "lora.gguf").close()
    with pytest.raises(BackendError, match=r"nowhere\.gguf: no such file"):
        open_model(files / "llama-bf16.gguf", mine=files / "nowhere.gguf").close()


def test_a_peft_folder_gives_the_logits_that_it_has_in_the_torch_engine(files: Path) -> None:
    expected = EXPECTED["llama-lora-r4"]
    with closing(open_model(files / "llama-bf16.gguf", mine=ADAPTERS / "llama-lora-r4")) as backend:
        for prompt in expected["prompts"]:
            assert_expected(last_logits(backend, prompt["ids"], "mine"), prompt)
        for prompt in expected["prompts_without_adapter"]:
            assert_expected(last_logits(backend, prompt["ids"]), prompt)


def test_a_folder_that_is_being_converted_leaves_no_file_if_the_process_is_killed(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with closing(open_model(files / "llama-bf16.gguf")) as backend:
        put_in_place = backend.adapters.prepare("mine", ADAPTERS / "llama-lora-r4")
        assert not list(tmp_path.iterdir())
        put_in_place()
        prompt = EXPECTED["llama-lora-r4"]["prompts"][0]
        assert_expected(last_logits(backend, prompt["ids"], "mine"), prompt)


def noise(base: Path, folder: Path) -> Path:
    """A PEFT folder of random changes to all linears but the router, experts' of other ranks and some left out."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.ndim < 2 or module.endswith(("embed_tokens", "block_sparse_moe.gate", "experts.2.w1")):
            continue
        rank, (outputs, inputs) = 2 if "experts.1." in name else 4, weight.shape
        size = 0.1 * weight.float().std().item()
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = size * torch.randn(outputs, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {r"experts\.1\.w\d": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["mixtral-bf16", "llama-untied-bf16"])
def test_a_peft_folder_changes_experts_head_queries_and_keys_as_in_the_torch_engine(
    name: str, files: Path, tmp_path: Path
) -> None:
    adapter = noise(ADAPTERS / name, tmp_path / "adapter")
    ids = list(range(40, 72))
    torch_settings = ModelSettings(
        max_model_len=256, cache=CacheSettings(tokens=1024, dtype="f16"), adapters={"mine": str(adapter)}
    )
    with closing(HFBackend(ADAPTERS / name, torch_settings, lambda _: None)) as backend:
        base, whole, part = (last_logits(backend, ids, *use) for use in ((None,), ("mine",), ("mine", 0.5)))
    with closing(open_model(files / f"{name}.gguf", mine=adapter)) as backend:
        for expected, use in (base, (None,)), (whole, ("mine",)), (part, ("mine", 0.5)):
            torch.testing.assert_close(last_logits(backend, ids, *use), expected, atol=CLOSE, rtol=0)
    assert (whole - base).abs().max() > 100 * CLOSE


def test_peft_folders_that_can_not_be_converted_are_refused_in_one_line(files: Path, tmp_path: Path) -> None:
    with closing(open_model(files / "llama-untied-bf16.gguf")) as backend:
        for folder, reason in (
            (ADAPTERS / "llama-untied-lora-rslora-head", "'lm_head' is saved whole, which a GGUF model can't use"),
            (noise(ADAPTERS / "mixtral-bf16", tmp_path / "experts"), r"block_sparse_moe.* is no linear of this model"),
            (ADAPTERS, r"adapter_config\.json is missing"),
        ):
            with pytest.raises(BackendError, match=reason) as raised:
                backend.adapters.prepare("mine", folder)
            assert "\n" not in str(raised.value)
    with pytest.raises(BackendError, match=r"of architecture 'phi3': make a file of it by convert_lora_to_gguf\.py"):
        Conversion(read_adapter(ADAPTERS / "llama-lora-r4"), Header(Path("m"), {"general.architecture": "phi3"}, ()))


def test_an_adapter_in_sixteen_bits_is_read(files: Path) -> None:
    prompt = EXPECTED["llama-lora-r4"]["prompts"][0]
    path = write_adapter(ADAPTERS / "llama-lora-r4", files / "half.gguf", ADAPTERS / "llama-bf16", dtype=np.float16)
    with closing(open_model(files / "llama-bf16.gguf", mine=path)) as backend:
        assert_expected(last_logits(backend, prompt["ids"], "mine"), prompt)


def test_the_plan_counts_adapters_and_the_room_for_more(files: Path) -> None:
    for model in (files / "llama-bf16.gguf", ADAPTERS / "llama-bf16"):
        alone, with_adapter, with_room = (
            outline(ModelSettings(model=str(model), gguf_engine="llama.cpp", **more), 4 << 30).weight_bytes
            for more in (
                {},
                {"adapters": {"mine": str(ADAPTERS / "llama-lora-r4")}},
                {"adapter_folder": str(files), "adapter_memory_mib": 7},
            )
        )
        assert with_adapter - alone == 2 * NUM_LOW_RANK
        assert with_room - alone == 7 << 20


# ---- the real server ----


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[RunningServer]:
    with run_server(
        "--model", str(files / "llama-bf16.gguf"), "--kv-cache=f16", "--lora", f"mine={files / 'lora.gguf'}",
        "--lora-folder", str(files), "--admin-key=chief", "--max-model-len=512", "--gguf-engine=llama.cpp",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers={"x-admin-key": "chief"}) as client:
        yield client


def say(client: httpx.Client, model: str, scale: float) -> str:
    body = {"model": model, "prompt": "once upon", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body | {"adapter_scale": scale})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_answers_with_different_adapters_take_turns_and_are_those_of_each_alone(
    client: httpx.Client, server: RunningServer
) -> None:
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "lora.gguf"})
    assert loaded.status_code == 200, loaded.text
    wanted = [("llama-bf16", 1.0), ("mine", 1.0), ("mine", 0.5), ("late", 1.0)]
    alone = [say(client, *one) for one in wanted]
    together = [""] * len(wanted)
    all_are_here = threading.Barrier(len(wanted))

    def answer(place: int) -> None:
        all_are_here.wait()
        together[place] = say(client, *wanted[place])

    threads = [threading.Thread(target=answer, args=(place,)) for place in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert together == alone
    assert alone[1] == alone[3]
    assert len(set(alone)) == 3
    assert server.errors().count("take turns") == 1
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    refused = client.post("/v1/completions", json={"model": "late", "prompt": "a"})
    assert refused.status_code == 404
