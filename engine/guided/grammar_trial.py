"""Tries grammars in a process of its own before the engine compiles them: some short ones take minutes, or gigabytes.

The library bounds what the steps of its parser cost, but not all that it does before them: the multiples of a number
are a machine with as many states as the number is large, and long patterns take the square of their length. Nothing
stops it from outside but the end of its process.
"""

import resource
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tightrope.engine.process.frames import pack, read_frame
from tightrope.processes import bare_environment, child_command, limit_cpu

CPU_S = 5  # It is for one grammar; enumerations of 30,000 texts take half a second.
MEMORY_BYTES = 512 << 20  # It bounds the address space, of which an interpreter with the library takes 30 MB.
WAIT_S = 60.0  # A busy machine may take so long to give it the processor.
MAX_LEXER_STATES = 20_000  # Each takes 2 KB, for as long as an answer by the grammar is written.


def compiled(vocabulary: LLTokenizer, source: str) -> LLMatcher:
    """The library's matcher, which knows whether there is a first token. What is wrong it says itself."""
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    native = LLMatcher(vocabulary, source, log_level=0, limits=limits)
    if not native.is_error():
        native.compute_bitmask()
    return native


class GrammarTrial:
    """One process, started with the first grammar, and anew behind one that has ended it. Safe for any thread."""

    def __init__(self, cpu_s: int = CPU_S) -> None:
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def passes(self, source: str) -> bool:
        """Whether a grammar in the library's form, right or wrong, is done with in bounded time and memory.

        Raises OSError when no process is to be had.
        """
        raw = source.encode("utf-8", "replace")
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(WAIT_S, process.kill)
            timer.start()
            try:
                process.stdin.write(pack(raw))
                process.stdin.flush()
                passes = bool(process.stdout.read(1))
            except BrokenPipeError:
                passes = False
            finally:
                timer.cancel()
            if not passes:
                _end(process)
                self._process = None
            return passes

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            child_command(__name__, str(self._cpu_s)),
            env=bare_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # The library says something there when it is stopped.
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # What is left to be written has no reader.
                pipe.close()
    process.wait()


def serve(read: BinaryIO, write: BinaryIO, cpu_s: int) -> None:
    """Answer each grammar, a frame of text, with a byte until the other side closes."""
    vocabulary = LLTokenizer("byte")
    while (source := read_frame(read)) is not None:
        limit_cpu(cpu_s)
        compiled(vocabulary, source.decode())
        write.write(b".")
        write.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
