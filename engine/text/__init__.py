"""Tokens to text, and texts that must not be written."""
