"""Adapters that come and go while the server runs: who may change them, what is refused, and what others notice."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkout import ADAPTERS, SUPPORT
from fake_api import api
from fakes import VOCAB_SIZE, ByteTokenizer, FakeAdapters, FakeBackend
from real_server import RunningServer, clean_environment, run_server
from safetensors.torch import load_file, save_file

from tightrope.backends.adapters import MIB, AdapterRoom, find_adapter
from tightrope.backends.errors import BackendError
from tightrope.engine.core import EngineCore
from tightrope.engine.errors import InvalidRequest, ModelNotFound
from tightrope.engine.settings import EngineSettings, LimitSettings
from tightrope.engine.types import GenerateRequest, StopRules, TokenPrompt

EXPECTED: Mapping[str, Any] = json.loads((ADAPTERS / "expected.json").read_text("utf-8"))["llama-lora-r4"]
CLOSE = 5e-3  # of logits; keys and values in float16 move them by up to 0.0031
ADMIN = {"authorization": "Bearer chief"}


# ---- names and memory, in the engine ----


def ask(request_id: str, adapter: str | None, max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(
        request_id, TokenPrompt((104, 105, 106)), stop=StopRules(max_tokens=max_tokens), adapter=adapter
    )


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def core(backend: FakeBackend) -> EngineCore:
    return EngineCore(backend, LimitSettings())


def load(core: EngineCore, name: str, path: Path) -> None:
    path.write_text(path.name)
    core.adapters.prepare(name, path)()


def test_an_unloaded_adapter_stays_until_the_last_answer_with_it_ends(
    core: EngineCore, backend: FakeBackend, tmp_path: Path
) -> None:
    load(core, "a", tmp_path / "a")
    core.add(core.prepare(ask("long", "a", max_tokens=8)))
    core.add(core.prepare(ask("short", "a", max_tokens=2)))
    core.step()
    core.adapters.unload("a")

    with pytest.raises(ModelNotFound, match="`a` does not exist"):
        core.add(core.prepare(ask("late", "a")))
    while core.has_work:
        core.free_adapters()
        assert backend.adapters.in_place
        core.step()
    core.free_adapters()
    assert backend.adapters.in_place == set()


def test_a_cancelled_answer_lets_its_adapter_go(core: EngineCore, backend: FakeBackend, tmp_path: Path) -> None:
    load(core, "a", tmp_path / "a")
    core.add(core.prepare(ask("r", "a")))
    core.adapters.unload("a")
    core.cancel("r")
    core.free_adapters()

    assert backend.adapters.in_place == set()


def test_a_name_that_is_loaded_again_finds_what_is_cached_only_where_its_files_are_the_same(
    core: EngineCore, tmp_path: Path
) -> None:
    def num_cached() -> int:
        core.add(core.prepare(ask("r", "a")))
        first = core.step().deltas[0]
        while core.has_work:
            core.step()
        assert first.prompt is not None
        return first.prompt.num_cached

    load(core, "a", tmp_path / "one")
    assert (num_cached(), num_cached()) == (0, 2)
    core.adapters.unload("a")
    load(core, "a", tmp_path / "two")
    assert (num_cached(), num_cached()) == (0, 2)
    (tmp_path / "two").write_text("other weights")
    core.adapters.prepare("a", tmp_path / "two", in_place=True)()
    assert num_cached() == 0
    core.adapters.unload("a")
    load(core, "a", tmp_path / "one")

    assert num_cached() == 2


NAMESPACE = """
import sys
from pathlib import Path
from fakes import FakeBackend
from tightrope.engine.core import EngineCore
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import GenerateRequest, TokenPrompt
from tightrope.server.state import _namespace

core = EngineCore(FakeBackend(), LimitSettings())
for path in map(Path, sys.argv[1:]):
    core.adapters.prepare(path.name, path)()
asked = GenerateRequest(
    "r", TokenPrompt((1, 2)), adapter=Path(sys.argv[-1]).name, adapter_scale=0.7, namespace=_namespace(b"key", "salt")
)
sequences = core.prepare(asked)
core.add(sequences)
print(repr(sequences[0].namespace), end="")
"""


def test_a_key_a_salt_and_an_adapter_have_the_same_namespace_in_every_process(tmp_path: Path) -> None:
    """Whatever was loaded before; other files have another one."""

    def namespace(*paths: Path) -> str:
        return subprocess.run(
            [sys.executable, "-c", NAMESPACE, *map(str, paths)],
            capture_output=True,
            text=True,
            check=True,
            env=clean_environment() | {"PYTHONPATH": str(SUPPORT)},
        ).stdout

    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_text("weights")
    other.write_text("other weights")
    first, again = namespace(mine), namespace(other, mine)
    mine.write_text("changed weights")

    assert first == again
    assert namespace(mine) != first


def test_a_loaded_name_is_given_to_another_path_in_place_only(
    core: EngineCore, backend: FakeBackend, tmp_path: Path
) -> None:
    load(core, "a", tmp_path / "one")
    load(core, "a", tmp_path / "one")  # is there already
    with pytest.raises(InvalidRequest, match="load_inplace"):
        load(core, "a", tmp_path / "two")
    core.adapters.prepare("a", tmp_path / "one", in_place=True)()
    core.free_adapters()

    assert core.adapters.paths == {"a": str(tmp_path / "one")}
    assert len(backend.adapters.in_place) == 1


def test_two_loads_of_a_name_at_a_time_leave_one(core: EngineCore, backend: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    (tmp_path / "two").touch()
    first, same, other = (core.adapters.prepare("a", tmp_path / name) for name in ("one", "one", "two"))
    first()
    same()
    with pytest.raises(InvalidRequest, match="unload it first"):
        other()

    assert core.adapters.paths == {"a": str(tmp_path / "one")}
    assert len(backend.adapters.in_place) == 1


def test_an_engine_serves_what_the_one_before_it_served(
    core: EngineCore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(core, "a", tmp_path / "a")
    load(core, "b", tmp_path / "b")
    (tmp_path / "c").touch()
    caplog.clear()
    core.adapters.restore({"b": str(tmp_path / "b"), "c": str(tmp_path / "c"), "gone": str(tmp_path / "gone")})

    assert core.adapters.paths == {"b": str(tmp_path / "b"), "c": str(tmp_path / "c")}
    assert [record.args[0] for record in caplog.records if record.args] == ["gone"]


def test_adapters_share_the_room_that_is_kept_for_them() -> None:
    room = AdapterRoom(3 * MIB)
    with room.taken("a", 2 * MIB):
        pass
    with pytest.raises(BackendError, match=r"takes 2\.0 MiB, and 1\.0 of the 3\.0 MiB for adapters are free"):
        room.taken("b", 2 * MIB).__enter__()
    with pytest.raises(ZeroDivisionError), room.taken("c", MIB):
        raise ZeroDivisionError
    room.give_back("a")
    with room.taken("d", 3 * MIB):
        pass


def test_only_paths_in_the_folder_of_adapters_are_found(tmp_path: Path) -> None:
    folder, outside = tmp_path / "loras", tmp_path / "outside"
    for place in (folder / "mine", outside, folder / "linked"):
        place.mkdir(parents=True)
        (place / "adapter_config.json").touch()
    (folder / "away").symlink_to(outside)
    (folder / "alias").symlink_to(folder / "mine")
    (folder / "linked" / "adapter_model.safetensors").symlink_to(outside / "adapter_config.json")

    for path in ("mine", "alias", "./mine", str(folder / "mine")):
        assert find_adapter(str(folder), path) == folder / "mine"
    for path in ("../outside", "mine/../../outside", "/etc", str(outside), "away", "linked", "nothing", "a\0b"):
        with pytest.raises(BackendError, match=r"no path within|no such file|leads out"):
            find_adapter(str(folder), path)


# ---- who may ----


async def test_a_mark_that_a_loaded_adapter_knows_is_text_where_a_person_types_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ByteTokenizer(added=["<|turn|>"])
    own.set_marks(["<|turn|>"], ["<|turn|>"])
    monkeypatch.setattr(FakeAdapters, "tokenizer", lambda store, name: own)
    (tmp_path / "poet").touch()
    monkeypatch.setattr("tightrope.engine.adapters.find_adapter", lambda folder, path: tmp_path / path)
    engine = EngineSettings.model_validate({"model": {"adapter_folder": str(tmp_path)}})
    async with api(admin_key="chief", engine=engine, chat_template="<|turn|>{{ messages[0].content }}?") as http:
        body = {"lora_name": "poet", "lora_path": "poet"}
        assert (await http.post("/v1/load_lora_adapter", json=body, headers=ADMIN)).status_code == 200
        chat = {"model": "poet", "messages": [{"role": "user", "content": "a<|turn|>b"}], "explain": True}
        reply = (await http.post("/v1/chat/completions", json=chat)).json()
    assert reply["explain"]["prompts"][0]["token_ids"].count(VOCAB_SIZE) == 1


async def test_without_an_admin_key_the_routes_are_closed() -> None:
    async with api() as http:
        for route in ("load", "unload"):
            refused = await http.post(f"/v1/{route}_lora_adapter", json={"lora_name": "a", "lora_path": "a"})
            assert refused.status_code == 403
            assert "--admin-key" in refused.json()["error"]["message"]


async def test_the_api_key_does_not_change_adapters_and_the_admin_key_opens_everything() -> None:
    async with api(api_key="client", admin_key="chief") as http:
        body = {"lora_name": "a", "lora_path": "a"}
        for header, status in ({"x-api-key": "client"}, 401), ({"x-admin-key": "chief"}, 403), (ADMIN, 403):
            refused = await http.post("/v1/load_lora_adapter", json=body, headers=header)
            assert refused.status_code == status
        assert "--lora-folder" in refused.json()["error"]["message"]
        for key, permission in ("client", "api"), ("chief", "admin"):
            answer = await http.get("/v1/auth/permission", headers={"authorization": f"Bearer {key}"})
            assert answer.json() == {"permission": permission}
        assert (await http.get("/v1/auth/permission")).status_code == 401


# ---- the real server ----


def test_an_adapter_with_the_name_of_the_model_stops_the_start() -> None:
    base = str(ADAPTERS / "llama-bf16")
    options = ["--model", base, "--port=0", "--lora", f"llama-bf16={ADAPTERS / 'llama-lora-r4'}"]
    command = [sys.executable, "-m", "tightrope", "serve", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=600)

    reason = "--lora: 'llama-bf16' means the model itself; give the adapter another name"
    assert (result.returncode, result.stderr) == (1, f"tightrope: {reason}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server may load adapters from."""
    folder = tmp_path_factory.mktemp("loras")
    shutil.copytree(ADAPTERS / "llama-lora-r4", folder / "good")
    shutil.copytree(ADAPTERS / "llama-lora-r4", folder / "louder")
    change_config(folder / "louder", lora_alpha=64)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with run_server(
        "--model", str(ADAPTERS / "llama-bf16"), "--kv-cache=f16", "--lora", f"first={folder / 'good'}",
        "--lora-folder", str(folder), "--lora-memory-mib=1", "--admin-key=chief", "--max-model-len=1024",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers=ADMIN) as client:
        yield client


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_adapter(client: httpx.Client, name: str, path: str, **more: object) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def unload_adapter(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def best_logprob(client: httpx.Client, model: str, ids: list[int]) -> tuple[int, list[float]]:
    """How many tokens were cached, and the differences to the likeliest token's logprob."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    answer = client.post("/v1/completions", json=body).json()
    found = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], [logprob - found[0] for logprob in found]


def test_a_loaded_adapter_is_listed_and_answers_until_it_is_unloaded(client: httpx.Client, folder: Path) -> None:
    prompt = EXPECTED["prompts"][0]
    expected = [logit - prompt["top20_logits"][0] for logit in prompt["top20_logits"][:5]]

    loaded = load_adapter(client, "mine", "good")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert (cards["mine"]["root"], cards["mine"]["parent"]) == (str(folder / "good"), "llama-bf16")
    assert [card["id"] for card in client.get("/v1/loras").json()["data"]] == ["first", "mine"]
    assert best_logprob(client, "mine", prompt["ids"])[1] == pytest.approx(expected, abs=CLOSE)

    unloaded = unload_adapter(client, "mine")
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    refused = client.post("/v1/completions", json={"model": "mine", "prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    refused = client.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "mine"}})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert unload_adapter(client, "mine").status_code == 404


def test_another_adapter_under_the_same_name_reads_the_prompt_anew(client: httpx.Client) -> None:
    ids = list(range(20, 84))
    assert load_adapter(client, "mine", "good").status_code == 200
    _, before = best_logprob(client, "mine", ids)
    assert load_adapter(client, "mine", "good").status_code == 200
    assert best_logprob(client, "mine", ids)[0] > 0
    refused = load_adapter(client, "mine", "louder")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_name")
    assert load_adapter(client, "mine", "louder", load_inplace=True).status_code == 200

    num_cached, after = best_logprob(client, "mine", ids)
    assert num_cached == 0
    assert after != pytest.approx(before, abs=0.1)
    assert unload_adapter(client, "mine").status_code == 200


def streamed(client: httpx.Client, model: str, started: threading.Event) -> str:
    """A long greedy answer; `started` is set with its first token."""
    body = {
        "model": model, "prompt": "once", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    text = ""
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                started.set()
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
    return text


def test_an_answer_under_way_finishes_with_the_adapter_that_is_unloaded(client: httpx.Client) -> None:
    assert load_adapter(client, "mine", "louder").status_code == 200
    undisturbed = streamed(client, "mine", threading.Event())
    answers: list[str] = []
    started = threading.Event()
    thread = threading.Thread(target=lambda: answers.append(streamed(client, "mine", started)))
    thread.start()
    assert started.wait(60)

    assert unload_adapter(client, "mine").status_code == 200
    assert client.post("/v1/completions", json={"model": "mine", "prompt": "a"}).status_code == 404
    assert load_adapter(client, "mine", "good").status_code == 200
    thread.join()
    assert answers == [undisturbed]
    assert unload_adapter(client, "mine").status_code == 200


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def widen(folder: Path) -> None:
    """A rank that takes more than a MiB."""
    rank = 4096
    change_config(folder, r=rank)
    resave(
        folder,
        lambda tensors: {
            name: torch.zeros(rank, t.shape[1]) if "lora_A" in name else torch.zeros(t.shape[0], rank)
            for name, t in tensors.items()
        },
    )


def lead_out(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(ADAPTERS / "llama-lora-r4")


BAD: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "rank 0": (lambda f: change_config(f, r=0), "r is 0; it must be a number above 0"),
    "wrong rank": (lambda f: change_config(f, r=3), "don't fit rank 3"),
    "DoRA": (lambda f: change_config(f, use_dora=True), "an adapter with DoRA can't be served"),
    "unknown target": (
        lambda f: resave(f, lambda ts: {name.replace("q_proj", "w_proj"): t for name, t in ts.items()}),
        "w_proj' is no linear of this model",
    ),
    "another base": (
        lambda f: resave(f, lambda ts: {n: t[:, :-1] if "lora_A" in n else t for n, t in ts.items()}),
        "an adapter for another base",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "pickled weights can run code",
    ),
    "truncated": (truncate, "adapter_model.safetensors"),
    "huge": (widen, "for adapters are free"),
    "link": (lead_out, "leads out of the folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
}


def test_what_can_not_be_loaded_is_refused_in_one_line_and_neighbours_notice_nothing(
    client: httpx.Client, folder: Path
) -> None:
    undisturbed = streamed(client, "first", threading.Event())
    answers: list[str] = []
    started = threading.Event()
    thread = threading.Thread(target=lambda: answers.append(streamed(client, "first", started)))
    thread.start()
    assert started.wait(60)

    for number, (spoil, reason) in enumerate(BAD.values()):
        place = folder / f"bad{number}"
        shutil.copytree(ADAPTERS / "llama-lora-r4", place)
        spoil(place)
        refused = load_adapter(client, "bad", place.name)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "lora_path")
        assert reason in error["message"]
        assert "\n" not in error["message"]
    for path in ("../good", "/etc/passwd", "nowhere", "good/adapter_config.json"):
        assert load_adapter(client, "bad", path).json()["error"]["param"] == "lora_path"
    for name in ("../up", "a/../b", "", "a b", "x" * 200, "tgi", "llama-bf16"):
        assert load_adapter(client, name, "good").json()["error"]["param"] == "lora_name"
    for body in ({"lora_path": "good"}, {"lora_name": 5, "lora_path": "good"}, {"lora_name": "a", "lora_path": ""}):
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 400

    thread.join()
    assert answers == [undisturbed]
    assert [card["id"] for card in client.get("/v1/loras").json()["data"]] == ["first"]


def test_a_negative_scale_takes_the_adapter_away_and_a_huge_one_is_refused(client: httpx.Client) -> None:
    body = {"model": "first", "prompt": "once", "max_tokens": 1, "adapter_scale": -1.0}
    assert client.post("/v1/completions", json=body).status_code == 200
    refused = client.post("/v1/completions", json=body | {"adapter_scale": 11})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter_scale")
