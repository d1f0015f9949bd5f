"""The API of text-generation-inference: /generate and its kin."""
