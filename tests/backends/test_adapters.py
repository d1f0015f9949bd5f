"""LoRA adapters in the torch engine: expected logits, mixed batches, merged weights, and files that are refused."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkout import ADAPTERS
from real_server import RunningServer, run_server
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightrope.backends.adapters import fingerprint
from tightrope.backends.detect import outline
from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft import read_adapter
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings

EXPECTED: Mapping[str, Any] = json.loads((ADAPTERS / "expected.json").read_text("utf-8"))
# Keys and values in float16 move logits by up to 0.0031; adapters move them by about 1.
CLOSE = 5e-3


def open_model(folder: Path, **adapters: Path) -> HFBackend:
    settings = ModelSettings(
        max_model_len=256,
        max_num_seqs=8,
        cache=CacheSettings(tokens=1024, dtype="f16"),
        adapters={name: str(path) for name, path in adapters.items()},
    )
    return HFBackend(folder, settings, lambda _: None)


def last_logits(backend: HFBackend, *asked: tuple[list[int], str | None, float]) -> Tensor:
    """[len(asked), V]: prompts with their adapters and scales, in one step; nothing stays cached."""
    chunks = []
    for seq_id, (ids, adapter, scale) in enumerate(asked):
        backend.kv.open(seq_id, ids, f"{adapter} {scale}", reuse="nothing")
        assert backend.kv.reserve(seq_id, len(ids))
        chunks.append(Chunk(seq_id, ids, 0, "last", adapter, scale))
    logits = backend.forward(chunks).clone()
    for chunk in chunks:
        backend.kv.close(chunk.seq_id, keep=False)
    return logits


@pytest.mark.parametrize("name", ["llama-lora-r4", "llama-untied-lora-rslora-head"])
def test_rows_with_an_adapter_and_rows_without_are_each_as_expected_in_one_batch(name: str) -> None:
    expected = EXPECTED[name]
    cases = [(p, "mine") for p in expected["prompts"]] + [(p, None) for p in expected["prompts_without_adapter"]]
    with closing(open_model(ADAPTERS / expected["base"], mine=ADAPTERS / name)) as backend:
        found = last_logits(backend, *((p["ids"], adapter, 1.0) for p, adapter in cases))

    for (prompt, _), logits in zip(cases, found, strict=True):
        torch.testing.assert_close(
            logits[prompt["top20_ids"]], torch.tensor(prompt["top20_logits"]), atol=CLOSE, rtol=0
        )


def test_a_mixture_of_experts_gives_the_expected_logits() -> None:
    with closing(open_model(ADAPTERS / "mixtral-bf16")) as backend:
        for prompt in EXPECTED["mixtral-bf16"]["prompts"]:
            logits = last_logits(backend, (prompt["ids"], None, 1.0))[0]
            torch.testing.assert_close(
                logits[prompt["top20_ids"]], torch.tensor(prompt["top20_logits"]), atol=CLOSE, rtol=0
            )


def write_adapter(folder: Path, deltas: Mapping[str, tuple[Tensor, Tensor]], **config: object) -> Path:
    """A PEFT folder of (A [r, K], B [N, r]) by module."""
    folder.mkdir(parents=True)
    rank = next(iter(deltas.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in deltas.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: Path, folder: Path, deltas: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> Path:
    """The base with scaling * B A added to its weights, in float32."""
    shutil.copytree(base, folder)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    for module, (a, b) in deltas.items():
        weights[f"{module}.weight"] += scaling * b @ a
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def noise(weights: Mapping[str, Tensor], chosen: Callable[[str], bool], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random low-rank changes of the chosen linears, about a tenth of their size."""
    torch.manual_seed(rank)
    deltas = {}
    for name, weight in weights.items():
        if name.endswith(".weight") and weight.ndim == 2 and chosen(name):
            n, k = weight.shape
            size = 0.1 * weight.float().std().item() / rank**0.5
            deltas[name.removesuffix(".weight")] = torch.randn(rank, k), size * torch.randn(n, rank)
    return deltas


@pytest.mark.parametrize(
    ("model", "part"),
    [("llama-bf16", "_proj"), ("mixtral-bf16", ".experts."), ("mixtral-bf16", "_proj")],
    ids=["all linears", "experts", "attention"],
)
def test_an_adapter_is_the_merged_weights(model: str, part: str, tmp_path: Path) -> None:
    deltas = noise(load_file(ADAPTERS / model / "model.safetensors"), lambda name: part in name, rank=5)
    adapter = write_adapter(tmp_path / "adapter", deltas)
    ids = EXPECTED[model]["prompts"][0]["ids"]
    with closing(open_model(ADAPTERS / model, mine=adapter)) as backend:
        whole, half = last_logits(backend, (ids, "mine", 1.0), (ids, "mine", 0.5))
    for scale, found in ((1.0, whole), (0.5, half)):
        folder = merged(ADAPTERS / model, tmp_path / str(scale), deltas, 2 * scale)
        with closing(open_model(folder)) as backend:
            expected = last_logits(backend, (ids, None, 1.0))[0]

        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_ranks_and_alphas_follow_their_patterns(tmp_path: Path) -> None:
    base = ADAPTERS / "llama-bf16"
    deltas = noise(load_file(base / "model.safetensors"), lambda name: "q_proj" in name, rank=4)
    first, second = sorted(deltas)
    deltas[second] = (deltas[second][0][:2], deltas[second][1][:, :2])
    adapter = write_adapter(
        tmp_path / "adapter", deltas, r=4, lora_alpha=4, use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"1\\.self_attn\\.q_proj": 6},
    )  # fmt: skip

    read = read_adapter(adapter)

    assert read.deltas[first].scaling == pytest.approx(4 / 4**0.5)
    assert read.deltas[second].scaling == pytest.approx(6 / 2**0.5)


def test_an_adapter_is_told_from_others_by_what_its_files_hold(tmp_path: Path) -> None:
    original = ADAPTERS / "llama-lora-r4"
    copies = {name: tmp_path / name for name in ("same", "louder", "trained_on")}
    for folder in copies.values():
        shutil.copytree(original, folder)
    with_config(copies["louder"], lora_alpha=64)
    change(copies["trained_on"], 0.5)
    with closing(open_model(ADAPTERS / "llama-bf16", mine=original, **copies)) as backend:
        marks = {name: backend.adapters.fingerprint(name) for name in ("mine", *copies)}

    assert marks["mine"] == marks["same"] == fingerprint(original)
    assert len({*marks.values()}) == 3


def with_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): t for name, t in tensors.items()}, folder / "adapter_model.safetensors")


def narrow(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def change(folder: Path, value: float) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, folder / "adapter_model.safetensors")


def poison(folder: Path) -> None:
    change(folder, float("nan"))


def pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: with_config(f, r=0), r"adapter_config\.json: r is 0; it must be a number above 0"),
        (lambda f: with_config(f, r=3), r"don't fit rank 3"),
        (lambda f: with_config(f, lora_alpha=None), r"lora_alpha is None"),
        (lambda f: with_config(f, use_dora=True), r"use_dora: an adapter with DoRA can't be served"),
        (lambda f: with_config(f, peft_type="IA3"), r"peft_type is 'IA3'; LORA can be served"),
        (lambda f: with_config(f, bias="all"), r"bias is 'all'"),
        (lambda f: with_config(f, rank_pattern={"(a+)+$": 4}), r"rank_pattern: .*too costly"),
        (lambda f: with_config(f, rank_pattern={"[": 4}), r"rank_pattern: .*no pattern"),
        (lambda f: rename(f, "q_proj", "w_proj"), r"'model\.layers\.0\.self_attn\.w_proj' is no linear of this model"),
        (lambda f: rename(f, "layers.1", "layers.9"), r"layers\.9\..* is no linear of this model"),
        (lambda f: rename(f, "lora_A", "lora_C"), r"tensor '.*lora_C.*' can't be used"),
        (lambda f: rename(f, "0.self_attn.q_proj.lora_A", "0.self_attn.k_proj.lora_A"), r"has lora_\w but no lora_\w"),
        (narrow, r"the model's linear has \d+ inputs: an adapter for another base"),
        (poison, r"holds NaN"),
        (pickle, r"adapter_model\.bin: pickled weights can run code"),
        (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
    ],
)  # fmt: skip
def test_an_adapter_that_can_not_be_right_is_refused_in_one_line(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "llama-lora-r4", folder)
    spoil(folder)

    with pytest.raises(BackendError, match=reason) as raised:
        open_model(ADAPTERS / "llama-bf16", mine=folder).close()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (narrow, r"the model's linear has \d+ inputs: an adapter for another base"),
        (lambda f: rename(f, "layers.1", "layers.9"), r"layers\.9\..* is no linear of this model"),
        (lambda f: with_config(f, use_dora=True), r"use_dora: an adapter with DoRA can't be served"),
    ],
)
def test_a_plan_refuses_the_adapters_that_serve_refuses(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "llama-lora-r4", folder)
    settings = ModelSettings(model=str(ADAPTERS / "llama-bf16"), max_model_len=256, adapters={"mine": str(folder)})
    assert outline(settings, None).chosen is not None
    spoil(folder)

    with pytest.raises(BackendError, match=reason):
        outline(settings, None)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    adapter = ADAPTERS / "llama-lora-r4"
    base = str(ADAPTERS / "llama-bf16")
    with run_server(
        "--model", base, "--kv-cache=f16", "--lora", f"mine={adapter}", "--lora", f"twin={adapter}"
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_a_request_names_an_adapter_as_its_model(client: httpx.Client) -> None:
    expected = EXPECTED["llama-lora-r4"]
    for key, model in (("prompts", "mine"), ("prompts_without_adapter", "llama-bf16"), ("prompts", "twin")):
        for prompt in expected[key]:
            body = {"model": model, "prompt": prompt["ids"], "max_tokens": 1, "temperature": 0, "logprobs": 5}
            answer = client.post("/v1/completions", json=body).json()

            found = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
            wanted = prompt["top20_logits"][:5]
            behind = [logit - wanted[0] for logit in wanted]
            assert [logprob - found[0] for logprob in found] == pytest.approx(behind, abs=CLOSE)


def test_adapters_are_listed_with_their_base(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()["data"]

    assert [(model["id"], model["parent"]) for model in models] == [
        ("llama-bf16", None),
        ("mine", "llama-bf16"),
        ("twin", "llama-bf16"),
    ]


def test_cached_tokens_are_never_shared_between_adapters(client: httpx.Client) -> None:
    def num_cached(model: str, scale: float = 1.0) -> int:
        body = {"model": model, "prompt": list(range(20, 84)), "max_tokens": 1, "adapter_scale": scale}
        details = client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])

    asked = [("mine", 1.0), ("twin", 1.0), ("llama-bf16", 1.0), ("mine", 0.5)]
    assert [num_cached(*a) for a in asked] == [0, 0, 0, 0]
    assert all(num_cached(*a) > 0 for a in asked)


def test_tgi_requests_name_an_adapter_by_its_id(client: httpx.Client) -> None:
    def text(**parameters: object) -> str:
        body = {"inputs": "once upon", "parameters": {"max_new_tokens": 12, **parameters}}
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["generated_text"])

    assert text(adapter_id="mine") == text(adapter_id="twin")
    assert text(adapter_id="mine") != text()
    assert text(adapter_id="mine", adapter_scale=0) == text()


def test_an_unknown_adapter_is_refused_and_its_neighbours_are_answered(client: httpx.Client) -> None:
    refused = client.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
    refused = client.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "nobody"}})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert client.post("/v1/completions", json={"model": "mine", "prompt": "a", "max_tokens": 1}).status_code == 200
