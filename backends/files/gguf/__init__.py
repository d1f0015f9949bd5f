"""GGUF files, read without trust: header, vocabulary, and how each tensor type lays out its blocks."""
