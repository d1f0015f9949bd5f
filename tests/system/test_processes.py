"""The processes of a server, as an operating system sees them: what code they run, what they are told, how they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from checkout import DATA
from real_server import MODULE, clean_environment, run_server

from tightrope.engine.process.frames import pack
from tightrope.processes import child_command, child_environment
from tightrope.server.prompts.template_worker import RenderJob

TINY = DATA / "adapters" / "llama-bf16"
SCRIPT = (str(Path(sys.executable).with_name("tightrope")),)
PATIENCE_S = 240  # two busy cores need some ten seconds to start a server
# Modules of Python, of ours and of what we use, that some process of a server imports after its start.
HOSTILE = ("queue", "json", "socket", "asyncio", "logging", "ctypes", "runpy", "jinja2", "torch", "uvicorn", "msgspec")
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def wait_for(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"never came: {what}"
        os.sched_yield()


def descendants(process: subprocess.Popen[str], *, running: str = "") -> list[psutil.Process]:
    """All processes that this one has started, and those that they have; or those that run a module of that name."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if not running or running in one.cmdline()]


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A command with pipes for its streams; it is killed in the end, and what it has started must then end as well."""
    process = subprocess.Popen(
        command,
        text=True,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    children: list[psutil.Process] = []
    try:
        yield process
        children = descendants(process)
    finally:
        process.kill()
        process.communicate()
        _, left = psutil.wait_procs(children, PATIENCE_S)
        for child in left:
            child.kill()
    assert left == []
    assert children


@pytest.fixture
def hostile_model(tmp_path: Path) -> Path:
    """A model's folder with modules that write a file each when they run."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / name)!r}, 'w')\nraise ImportError\n")
    return folder


def ran(folder: Path) -> list[str]:
    return [name for name in HOSTILE if (folder.parent / name).exists()]


@pytest.mark.parametrize("program", [pytest.param(SCRIPT, marks=pytest.mark.slow), MODULE], ids=["script", "module"])
def test_no_code_of_the_current_folder_runs(hostile_model: Path, program: Sequence[str]):
    environment = {"PYTHONPATH": f"{os.pathsep}/no/such/folder"}  # the part before the colon means the current folder
    template = "{{ messages[0].content }}"
    with run_server(
        ".", f"--chat-template={template}", program=program, cwd=hostile_model, environment=environment
    ) as server:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE_S).status_code == 200

    assert ran(hostile_model) == []


def test_no_code_of_the_current_folder_runs_in_the_server_of_a_chat(hostile_model: Path):
    environment = clean_environment() | {"PYTHONPATH": ""}
    chat = [*MODULE, "chat", "."]
    subprocess.run(chat, cwd=hostile_model, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=PATIENCE_S)

    assert ran(hostile_model) == []


def test_folders_that_pythonpath_names_are_searched_by_every_process(tmp_path: Path):
    (tmp_path / "named.py").write_text("")
    environment = clean_environment() | {"PYTHONPATH": os.pathsep.join(["", str(tmp_path), "relative"])}
    script = (
        "import subprocess, sys; from tightrope.processes import *; search_no_current_folder(); "
        "sys.exit(subprocess.run(child_command('named'), env=bare_environment()).returncode)"
    )

    assert subprocess.run([sys.executable, "-P", "-c", script], env=environment, cwd="/").returncode == 0


def test_a_child_gets_no_settings_and_no_keys_but_the_hubs_token():
    script = "from tightrope.processes import *; import json; print(json.dumps(sorted(child_environment())))"
    given = {"API_KEY": "a", "TIGHTROPE_API_KEY": "b", "HF_TOKEN": "c"}

    result = subprocess.run(
        [sys.executable, "-P", "-c", script], env=os.environ | given, check=True, stdout=subprocess.PIPE
    )

    assert given.keys() & set(json.loads(result.stdout)) == {"HF_TOKEN"}


def test_search_paths_lead_into_no_relative_folder(tmp_path: Path):
    (tmp_path / "show.py").write_text("import sys, os, json\nprint(json.dumps([sys.path, dict(os.environ)]))\n")
    paths = ("PYTHONPATH", "LD_LIBRARY_PATH", "PATH")
    given = os.pathsep.join(["", ".", "bin", str(tmp_path)])  # empty: as `PATH=$NONE:...` leaves it
    script = (
        "import subprocess, sys; from tightrope.processes import *; sys.path.append('marker'); "
        "search_no_current_folder(); assert 'marker' not in sys.path; "
        "sys.exit(subprocess.run(child_command('show'), env=child_environment()).returncode)"
    )

    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=clean_environment() | dict.fromkeys(paths, given),
        cwd="/",
        check=True,
        stdout=subprocess.PIPE,
    )

    searched, environment = json.loads(result.stdout)
    assert [path for path in searched if not os.path.isabs(path)] == []
    assert {name: environment[name] for name in paths} == dict.fromkeys(paths, str(tmp_path))
    assert environment["RUST_BACKTRACE"] == "0"


def test_no_process_but_the_front_knows_the_keys():
    key = "not-for-children"
    with run_server(str(TINY), environment={"TIGHTROPE_API_KEY": key, "HF_TOKEN": key}) as server:
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
            headers={"authorization": f"Bearer {key}"},
            timeout=PATIENCE_S,
        ).raise_for_status()
        (worker,) = descendants(server.process, running="tightrope.server.prompts.template_worker")
        (engine,) = descendants(server.process, running="tightrope.engine.process.child")
        assert key not in worker.environ().values()
        assert "TIGHTROPE_API_KEY" not in engine.environ()


# ---- how they end ----


@pytest.mark.slow
def test_an_engine_that_loads_ends_with_a_front_that_is_killed():
    with started(*MODULE, "serve", str(TINY), "--port=0") as front:
        wait_for(lambda: descendants(front, running="tightrope.engine.process.child"), "the engine")
        (engine,) = descendants(front, running="tightrope.engine.process.child")
        wait_for(lambda: engine.memory_info().rss > 50 << 20, "the engine's libraries")
        engine.suspend()  # it can't notice anything by itself now


@pytest.mark.slow
def test_an_engine_and_an_endless_template_end_with_a_front_that_is_killed():
    template = "{% if messages[0].content == 'loop' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
    with run_server(str(TINY), f"--chat-template={template}", status=None) as server:

        def chat(words: str) -> None:
            body = {"messages": [{"role": "user", "content": words}], "max_tokens": 1}
            with suppress(httpx.HTTPError):
                httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)

        chat("hello")
        (worker,) = descendants(server.process, running="tightrope.server.prompts.template_worker")
        (engine,) = descendants(server.process, running="tightrope.engine.process.child")
        idle_s = worker.cpu_times().user
        asking = threading.Thread(target=chat, args=["loop"])
        asking.start()
        wait_for(lambda: worker.cpu_times().user > idle_s + 0.1, "the endless template")
        engine.suspend()
        server.process.kill()
        asking.join()
        _, left = psutil.wait_procs([worker, engine], PATIENCE_S)
        for child in left:
            child.kill()
    assert left == []


@pytest.mark.slow
def test_the_server_of_a_chat_ends_with_a_chat_that_is_killed():
    with started(*MODULE, "chat", str(TINY)) as chat:
        assert chat.stdout is not None
        assert "http://127.0.0.1" in chat.stdout.readline()


def test_a_template_that_never_ends_is_ended_by_the_time_that_it_computes():
    job = RenderJob(ENDLESS, ({},)).packed()
    worker = child_command("tightrope.server.prompts.template_worker", "1")

    ended = subprocess.run(worker, input=pack(job), capture_output=True, timeout=PATIENCE_S)

    assert ended.returncode == -signal.SIGXCPU


def test_an_abort_of_llama_cpp_calls_no_debugger():
    script = "import llama_cpp._ggml as g; g.libggml.ggml_abort(b'file.c', 1, b'the reason')"

    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert result.returncode == -signal.SIGABRT
    assert "the reason" in result.stderr
    assert len(result.stderr.splitlines()) <= 2, result.stderr


# ---- their streams ----


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_a_server_serves_without_its_streams(streams: str):
    shell = f'exec "$0" "$@" {streams}'
    with started("sh", "-c", shell, *MODULE, "serve", str(TINY), "--port=0") as front:
        process = psutil.Process(front.pid)
        wait_for(lambda: listening(process), "the port")
        url = f"http://127.0.0.1:{listening(process)[0]}"
        wait_for(lambda: httpx.get(f"{url}/health", timeout=60).status_code == 200, "the model")
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=PATIENCE_S)
        assert json.loads(answer.text)["usage"]["completion_tokens"] == 1


def listening(process: psutil.Process) -> list[int]:
    return [found.laddr.port for found in process.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
