"""GGUF files in the torch engine, and which of the two engines runs a file."""
