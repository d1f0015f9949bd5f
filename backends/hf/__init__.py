"""Hugging Face model folders in our own torch engine."""
