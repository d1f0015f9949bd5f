"""`tightrope serve` with an EXL2 model of Yi-34B's shape on a card of 24 GB: whether it starts, and what it takes.

The folder is a sparse file: its sizes are the model's, its codes are zero, and so no step's speed is a model's.
"""

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.gpu.random_weights import SMALL, YI_34B, exl2_entries, write_sparse
from bench.gpu.run import Row, Run, reason, tried
from bench.peers import StartFailed, finding_ours, free_port, started
from bench.small_models import write_tokenizer
from bench.sse import stream

CAP = int(23.4 * 2**30)  # bytes that a card of 24 GB has free beside the context of a process
CONTEXT, PROMPT, ANSWER = 24_000, 23_000, 64  # tokens
START_S = 240.0
ANNOUNCE_S = 20.0
SAMPLE_S = 0.02
LETTER = 68  # a token of bench.small_models that is a letter: zeros make all tokens as likely
MOST_LINES = 40  # of the server's log


def rows(run: Run) -> Iterator[Row]:
    context, prompt, answer = (256, 100, 8) if run.is_smoke else (CONTEXT, PROMPT, ANSWER)
    sizes = SMALL if run.is_smoke else YI_34B
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_tokenizer(folder)
        write_sparse(folder, sizes, exl2_entries(sizes))
        port = free_port()
        command = [sys.executable, "-m", "tightrope", "serve", str(folder), "--port", str(port)]
        command += ["--max-model-len", str(context), "--kv-cache", "q8", "--device", run.device.type]
        command += ["--gpu-memory-fraction", f"{_fraction(run):.6f}"]
        beside = _context_bytes(run)
        with (Path(name) / "log").open("w+") as log, _least_free(run) as least:
            before = least[0]

            def taken() -> Row:
                """The most that the server has had of the card so far, without its context."""
                peak = before - least[0] - beside
                return {"peak_bytes": peak, "context_bytes": beside, "cap_bytes": CAP, "holds": peak <= CAP}

            begun_s = time.perf_counter()
            try:
                with started(command, f"http://127.0.0.1:{port}/health", log, finding_ours(), START_S):
                    start_s = time.perf_counter() - begun_s
                    yield {"case": f"starts at {context} tokens", "start_s": start_s, **taken()}
                    for case, num_tokens in (
                        ("a short prompt", 16),
                        ("a long prompt", prompt),
                        ("the same again", prompt),
                    ):
                        yield tried({"case": case}, lambda n=num_tokens: _ask(port, n, answer) | taken())  # type: ignore[misc]
                    _wait_announced(Path(log.name))
            except StartFailed as error:
                yield {"case": f"starts at {context} tokens", "failed": reason(error), **taken(), "holds": False}
            log.seek(0)
            yield {"case": "log", "lines": _lines(log.read(), folder)}


def _ask(port: int, num_tokens: int, answer: int) -> Row:
    """A prompt of so many tokens, each a letter."""
    body = {
        "prompt": "a" * num_tokens,
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(LETTER): 100},
    }
    found = asyncio.run(stream(f"http://127.0.0.1:{port}", "/v1/completions", body))
    span_s = found.arrivals_s[-1] - found.arrivals_s[0]  # none where all came at once
    return {
        "prompt_tokens": found.prompt_tokens,
        "cached_tokens": found.cached_tokens,
        "ttft_s": found.ttft_s,
        "tokens": found.num_tokens,
        "tokens_per_s": (found.num_tokens - 1) / span_s if span_s else None,
    }


def _wait_announced(log: Path) -> None:
    """Until the server has said what it serves, which it may do while it answers already."""
    until_s = time.monotonic() + ANNOUNCE_S
    while "ready " not in log.read_text() and time.monotonic() < until_s:
        time.sleep(0.1)


def _fraction(run: Run) -> float:
    """CAP as a share of all that the card has."""
    if run.device.type != "cuda":
        return 1.0
    return min(1.0, CAP / torch.cuda.get_device_properties(run.device).total_memory)


def _context_bytes(run: Run) -> int:
    """What a process takes of the card that has done nothing there."""
    if run.device.type != "cuda":
        return 0
    before = _free(run)
    code = "import torch; torch.cuda.synchronize(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        taken = before - _free(run)
        process.communicate(b"\n")
    return taken


@contextmanager
def _least_free(run: Run) -> Iterator[list[int]]:
    """One number: the least that was free on the card at any time since, in bytes."""
    least = [_free(run)]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_S):
            least[0] = min(least[0], _free(run))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield least
    finally:
        is_over.set()
        watcher.join()


def _free(run: Run) -> int:
    return torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else 0


def _lines(log: str, folder: Path) -> list[str]:
    """What the server said at its start, without where its files are."""
    return [line[:200] for line in log.replace(str(folder), "MODEL").splitlines()[:MOST_LINES]]
