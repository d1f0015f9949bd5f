"""GGUF files through the low-level calls of llama-cpp-python."""

import os

# ggml would run a debugger over a process that it ends, for up to half a minute, where one is installed. It looks here
# when it is loaded, which the other modules of this package do.
os.putenv("GGML_NO_BACKTRACE", "1")
