"""Asks llama.cpp whether it would serve a file, without reading its weights.

It knows which tensors an architecture needs, of which shapes, and which keys; asked so, `plan` refuses what `serve`
would. It ends the process over some files, and may take long over others: so it is asked in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.native import ContextOptions, ModelOptions, NativeContext, NativeModel
from tightrope.processes import child_command, child_environment

TIMEOUT_S = 120.0  # The largest models take seconds.


def try_load(path: Path, options: ContextOptions) -> tuple[str, ...]:
    """What llama.cpp notes about a model and a context of it, one line each; some hundred ms, and no weights in memory.

    Raises BackendError in one line when it refuses either, or ends the process over it.
    """
    return _ask(path, json.dumps(asdict(replace(options, threads=1))))


def try_vocabulary(path: Path) -> tuple[str, ...]:
    """The same of a file's vocabulary alone, whoever runs the model."""
    return _ask(path, json.dumps(None))


def _ask(path: Path, arguments: str) -> tuple[str, ...]:
    command = child_command("tightrope.backends.gguf.trial", str(path), arguments)
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, env=child_environment()
        )
    except subprocess.TimeoutExpired:
        raise BackendError(f"{path}: llama.cpp can't tell within {TIMEOUT_S:g} s whether it can load it") from None
    if done.returncode != 0:
        raise BackendError(f"{path}: llama.cpp ends over it: {_last_words(done.stderr)}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise BackendError(answer["error"])
    return tuple(answer["notes"])


def _last_words(stderr: bytes) -> str:
    """Why a native process ended: what it asserted or threw, without the place in its sources."""
    text = stderr.decode("utf-8", errors="replace")
    found = re.findall(r"(GGML_ASSERT\(.*\) failed|what\(\):\s+.*)", text)
    lines = found or [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it gave no reason"


def main() -> None:
    """Entry point of the process: path and context options on the command line, one line of JSON to standard output.

    null in the place of the options: nothing but the vocabulary is tried.
    """
    path, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        model = NativeModel(path, ModelOptions(is_vocabulary=options is None, has_weights=False))
        if options is not None:
            NativeContext(model, ContextOptions(**options))
    except BackendError as error:
        print(json.dumps({"error": str(error)}))
    else:
        print(json.dumps({"notes": model.notes}))
    sys.stdout.flush()
    os._exit(0)  # Nothing is worth tidying up.


if __name__ == "__main__":
    main()
