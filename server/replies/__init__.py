"""What a model writes, told apart: thoughts, words for the reader, and calls of tools; by the marks of its template."""
