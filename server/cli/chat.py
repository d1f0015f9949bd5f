"""`tightrope chat`: a conversation in the terminal, over the same HTTP interface that everyone else uses."""

import json
import re
import readline  # noqa: F401  # gives input() its history and line editing
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import httpx

from tightrope.engine.console import printable, printable_lines
from tightrope.processes import child_command
from tightrope.server.cli.failures import CommandFailed

HELP = "/reset forgets the conversation, /undo the last turn, /exit leaves; Ctrl-C stops an answer."
STOP_GRACE_S = 10

Message = dict[str, str]


def chat(url: str, api_key: str | None, system: str | None, max_tokens: int | None) -> int:
    """Talk until /exit or end of input; return the exit status. Raises CommandFailed if no server answers."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    # a long prompt may take minutes to its first token, so only connecting has a limit
    with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(None, connect=10)) as client:
        print(f"{printable(_served_model(client))} at {base}\n{HELP}")
        start: list[Message] = [{"role": "system", "content": system}] if system else []
        messages = list(start)
        while (text := _read("\n> ")) is not None:
            match text.strip():
                case "":
                    continue
                case "/exit" | "/quit" | "/bye":
                    return 0
                case "/reset":
                    messages = list(start)
                    print("(forgotten)")
                case "/undo":
                    del messages[max(len(start), len(messages) - 2) :]
                    print(f"({len(messages) // 2} turns left)")
                case command if command.startswith("/"):
                    print(HELP)
                case _:
                    turn = [*messages, {"role": "user", "content": text}]
                    answer = _answer(client, turn, max_tokens)
                    if answer:  # A turn that failed leaves no trace.
                        messages = [*turn, {"role": "assistant", "content": answer}]
    return 0


def _read(prompt: str) -> str | None:
    """A line from the person; None at the end of input, "" when Ctrl-C dropped the line."""
    try:
        return input(prompt)
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("  (/exit leaves)")
        return ""


def _served_model(client: httpx.Client) -> str:
    try:
        reply = client.get("/v1/models")
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except httpx.InvalidURL as error:
        raise CommandFailed(f"--url: {client.base_url} is no address: {error}") from None
    except httpx.HTTPStatusError as error:
        raise CommandFailed(f"{client.base_url} refuses: {_reason(error.response)}") from None
    except httpx.HTTPError as error:
        raise CommandFailed(f"no server answers at {client.base_url}: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise CommandFailed(
            f"what answers at {client.base_url} doesn't list its models; is it an OpenAI-style API?"
        ) from None


def _answer(client: httpx.Client, messages: list[Message], max_tokens: int | None) -> str:
    """Stream one answer to the screen and return it, as far as it came."""
    pieces: list[str] = []
    body = {"messages": messages, "stream": True, "max_tokens": max_tokens}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.is_error:
                reply.read()
                print(f"({printable(_reason(reply))})")
                return ""
            for piece in _pieces(reply.iter_lines()):
                pieces.append(piece)
                print(printable_lines(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:  # Leaving the `with` closes the connection, which stops the work.
        print(" (stopped)")
    except (httpx.HTTPError, CommandFailed) as error:
        print(f"\n({printable(str(error))})")
    return "".join(pieces)


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The texts of a stream of chunks. Raises CommandFailed with the server's words when it reports an error."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # This is a comment that keeps the connection open, or the empty line behind an event.
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk: dict[str, Any] = json.loads(data)  # A server may send any JSON.
        if "error" in chunk:
            raise CommandFailed(_error_text(chunk))
        for choice in chunk.get("choices", ()):
            yield choice["delta"].get("content") or ""


def _reason(reply: httpx.Response) -> str:
    try:
        return _error_text(reply.json())
    except ValueError:
        return f"{reply.status_code} {reply.reason_phrase}"


def _error_text(body: object) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


# ---- a server of our own ----


@contextmanager
def own_server(options: Mapping[str, str]) -> Iterator[str]:
    """Serve a model on a free port while the context lasts; gives its URL once the model is loaded.

    `options` are passed on by name. Raises CommandFailed if the server ends before it is ready; it has said why.
    """
    command = child_command("tightrope", "serve", "--log-level=warning")
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--host=127.0.0.1", "--port=0"]
    # its own session: Ctrl-C here stops an answer, not the server
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # A closed terminal must not leave the server behind.
    try:
        assert server.stdout is not None
        yield _wait_ready(server.stdout)
    finally:
        server.terminate()
        try:
            server.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_ready(output: Iterator[str]) -> str:
    url = ""
    for line in output:
        url = url or "".join(re.findall(r"http://\S+", line)[:1])
        if line.startswith("ready"):
            return url
    raise CommandFailed("the model isn't served, so there is nobody to chat with")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
