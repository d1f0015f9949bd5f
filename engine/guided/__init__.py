"""Answers of a given shape: grammars, JSON schemas and regular expressions."""
