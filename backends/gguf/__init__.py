"""GGUF files through the low-level calls of llama-cpp-python."""
