"""Steps with adapters under recorded graphs: a card's kernels in Triton's interpreter, and what can't be recorded."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS
from interpreted import interpreted
from safetensors.torch import load_file, save_file
from test_adapters import noise, open_model, write_adapter
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run.graphs import DecodeGraphs
from tightrope.backends.protocol import Chunk
from tightrope.kernels import dispatch, reference

BASE = ADAPTERS / "llama-bf16"
PROMPT = list(range(5, 25))


def as_recorded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Stands in for a recording: what it launches is launched again, without what a step knows on the host."""
    return run


def decode(
    backend: HFBackend,
    users: dict[int, str | None],
    num_steps: int,
    decoding: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """[steps, B, V]: all sequences read PROMPT with their adapters, then, while `decoding`, one token a step."""
    for seq_id, adapter in users.items():
        backend.kv.open(seq_id, PROMPT, str(adapter), reuse="nothing")
        assert backend.kv.reserve(seq_id, len(PROMPT) + num_steps)
        backend.forward([Chunk(seq_id, PROMPT, 0, "last", adapter)])
        backend.kv.commit(seq_id, 0, PROMPT)
    found = []
    for i in range(num_steps):
        place, token = len(PROMPT) + i, [30 + i]
        chunks = [Chunk(seq_id, token, place, "last", adapter, 0.5 + i) for seq_id, adapter in users.items()]
        with decoding():
            found.append(backend.forward(chunks).clone())
        for seq_id in users:
            backend.kv.commit(seq_id, place, token)
    for seq_id in users:
        backend.kv.close(seq_id, keep=False)
    return torch.stack(found)


def adapter(folder: Path, rank: int) -> Path:
    weights = load_file(BASE / "model.safetensors")
    return write_adapter(folder, noise(weights, lambda name: "_proj" in name, rank))


def test_recorded_steps_add_what_each_rows_adapter_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: tuple[dict[int, str | None], ...] = ({0: "one", 1: None, 2: "two"}, {3: "two", 4: "one"})
    folders = {"one": adapter(tmp_path / "one", 4), "two": adapter(tmp_path / "two", 20)}
    with closing(open_model(BASE, **folders)) as backend:
        wanted = [decode(backend, users, 2) for users in steps]
        graphs = DecodeGraphs(backend.runner._forward, 4, 256, "cpu", as_recorded)

        @contextmanager
        def on_card() -> Iterator[None]:
            with interpreted("ops") as ops, monkeypatch.context() as patch:
                patch.setattr(ops, "linear", reference.linear)  # A card's is in the weights' dtype.
                patch.setattr(dispatch, "_kernels_for", lambda x: ops)
                patch.setattr(backend.runner, "_graphs", graphs)
                yield

        found = [decode(backend, users, 2, on_card) for users in steps]

    assert {(size, has_adapters) for size, _, has_adapters in graphs._graphs} == {(4, True), (2, True)}
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3)  # Keys and values are float16.
        assert not torch.allclose(theirs[:, 0], theirs[:, 1], atol=0.1)


def launches(backend: HFBackend, name: str) -> int | None:
    rows = backend._adapters.rows([Chunk(0, [1], 0, "last", name), Chunk(1, [1], 0, "last")])
    assert rows is not None
    return rows.launches


def test_adapters_that_only_add_to_linears_can_be_recorded_and_others_cannot(tmp_path: Path):
    experts = write_adapter(
        tmp_path / "experts",
        noise(load_file(ADAPTERS / "mixtral-bf16" / "model.safetensors"), lambda name: ".experts." in name, 4),
    )
    norm = write_adapter(tmp_path / "norm", noise(load_file(BASE / "model.safetensors"), lambda n: "q_proj" in n, 4))
    tensors = load_file(norm / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.ones(128)
    save_file(tensors, norm / "adapter_model.safetensors")
    with closing(open_model(BASE, plain=adapter(tmp_path / "plain", 4), norm=norm)) as backend:
        assert launches(backend, "plain") is not None
        assert launches(backend, "norm") is None
    with closing(open_model(ADAPTERS / "mixtral-bf16", experts=experts)) as backend:
        assert launches(backend, "experts") is None


def test_a_slot_is_given_away_again_once_its_adapter_is_gone(tmp_path: Path):
    folders = [adapter(tmp_path / name, 4) for name in "abc"]
    with closing(open_model(BASE, a=folders[0], b=folders[1])) as backend:
        before = decode(backend, {0: "b", 1: None}, 1)
        backend.adapters.remove("a")
        backend.adapters.prepare("c", folders[2])()
        rows = backend._adapters.rows([Chunk(0, [1], 0, "last", "c"), Chunk(1, [1], 0, "last", "b")])

        assert rows is not None
        assert rows.slots.tolist() == [0, 1]
        assert torch.equal(decode(backend, {0: "b", 1: None}, 1), before)


def test_one_linear_under_two_names_is_refused(tmp_path: Path):
    folder = adapter(tmp_path / "twice", 4)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if ".layers.0.self_attn.q_proj." in name]:
        tensors[name.replace("model.layers", "layers")] = tensors[name].clone()
    save_file(tensors, folder / "adapter_model.safetensors")

    with pytest.raises(BackendError, match=r"adapter_model\.safetensors: '[a-z0-9_.]+' is there twice, by two names$"):
        open_model(BASE, twice=folder)
